#!/usr/bin/env bash
# PyTorch's own torch for one CUDA, into the system's Python, where NVIDIA's image has its own as well.
#
#   docker/torch.sh CUDA [INDEX]    12.8.1, and the index that has a folder cu128; without one, what pip is set up for
set -euo pipefail
cd "$(dirname "$0")/.."

cuda=${1:?the CUDA, such as 12.8.1} index=${2:-}
major=${cuda%%.*} minor=${cuda#*.}
wanted=torch$(grep -o '^torch==.*' torchscript/requirements.in | cut -c6-)
python3 -m pip install --quiet --disable-pip-version-check --no-cache-dir \
    --break-system-packages --root-user-action=ignore \
    ${index:+--index-url "$index/cu$major${minor%%.*}"} "$wanted"

package=$(python3 -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
built=$(sed -n "s/^cuda: .*'\(.*\)'/\1/p" "$package/version.py")
if [ -n "$index" ] && [ "$built" != "$major.${minor%%.*}" ]; then
    echo "torch is built for CUDA $built, not $cuda" >&2
    exit 1
fi

#!/usr/bin/env bash
# Ours beside diffusers on a machine with an NVIDIA GPU. It needs a checkout with bench/carry in it (bench/pack.sh makes
# that) and a Python 3.12 with torch 2.11 and transformers; no network, no Rust.
#
#   bench/gpu.sh correctness   latents against diffusers' on the same GPU; exit status 1 when they differ
#   bench/gpu.sh speed         time and memory at full size; both stages stay below 10 minutes
#   bench/gpu.sh [all]         one after the other
#   bench/gpu.sh --dry         all of it on the CPU, with the small model: about 2 minutes
#
# PYTHON names another Python than .venv's or python3.
set -euo pipefail
cd "$(dirname "$0")/.."

stage=all
dry=()
for argument in "$@"; do
    case $argument in
        correctness | speed | all) stage=$argument ;;
        --dry) dry=(--dry) ;;
        *)
            sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
            exit 2
            ;;
    esac
done

python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=$PWD/.venv/bin/python; fi

carry=bench/carry
if [ ${#dry[@]} -gt 0 ]; then
    carry=target/bench/carry-dry
    bench/pack.sh --tiny "$carry"
elif [ -f "$carry.tar.xz" ]; then
    rm -rf "$carry"
    tar --extract --file "$carry.tar.xz" --directory "$(dirname "$carry")"
elif [ ! -x "$carry/bin/sdxl-worker" ]; then
    echo "error: no $carry here; run bench/pack.sh where the project is built" >&2
    exit 3
fi

# The worker runs on the libtorch of the Python it is compared with.
if [ -z "${LIBTORCH:-}" ]; then
    LIBTORCH=$("$python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
fi
export LIBTORCH
export HF_HUB_OFFLINE=1

if [ -d "$carry/wheels" ] && ! "$python" -c 'import diffusers, peft' 2>/dev/null; then
    site=$PWD/target/bench/site
    rm -rf "$site"
    "$python" -m pip install --quiet --no-index --no-deps --target "$site" "$carry"/wheels/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi

exec "$python" bench/gpu_check.py "$stage" --carry "$carry" "${dry[@]}"

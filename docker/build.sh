#!/usr/bin/env bash
# Compiles the worker against the torch of this machine's Python, exports the graphs, and lays out what runs.
#
#   docker/build.sh OUT
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:?the folder to make}
LIBTORCH=$(python3 -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
# NVIDIA calls its own 2.11.0a0.
export LIBTORCH LIBTORCH_BYPASS_VERSION_CHECK=1

.ci/setup.sh
cargo build --release --locked --bins
docker/graphs.sh "$out/graphs"
docker/app.sh "$out"

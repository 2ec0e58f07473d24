#!/usr/bin/env bash
# The graphs that ship: for every stock architecture and the demo model. float16 is for GPUs; the demo's float32 lets
# test_input.json run on a CPU. What is in the folder already, made by the same code, is kept.
#
#   docker/graphs.sh OUT
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:?the folder of the graphs}
export=(.venv/bin/python torchscript/export.py --out "$out")
architectures=()
for folder in torchscript/archs/*/; do architectures+=(--arch "$(basename "$folder")"); done

"${export[@]}" --model models/demo --dtype float32 --dtype float16
"${export[@]}" "${architectures[@]}" --dtype float16

#!/usr/bin/env bash
# Gathers in bench/carry what a GPU machine lacks: the stripped programs, the graphs, the small model, diffusers and
# what it needs for LoRAs.
#
#   bench/pack.sh                 after `make build`; about 8 minutes the first time
#   bench/pack.sh --tiny FOLDER   only what a dry run needs
#
# The whole checkout with bench/carry in it stays below 64 MiB.
set -euo pipefail
cd "$(dirname "$0")/.."

carry=bench/carry
export=(--arch sdxl)
if [ "${1:-}" = --tiny ]; then
    carry=$2
    export=()
fi
readonly LIMIT_MIB=34 # leaves 30 for the rest of the checkout, the demo model among it
readonly PYTHON=.venv/bin/python

mkdir -p "$carry/bin" "$carry/models"
for program in sdxl-worker sdxl-worker-engine; do
    strip -o "$carry/bin/$program" "target/release/$program"
done
$PYTHON torchscript/tiny_models.py --out "$carry/models/tiny"
$PYTHON torchscript/export.py "${export[@]}" --model "$carry/models/tiny" \
    --dtype float32 --dtype float16 --dtype bfloat16 --out "$carry/graphs"
$PYTHON torchscript/export.py --model "$carry/models/tiny" --dtype float32 --fused --out "$carry/graphs"

if [ ${#export[@]} -gt 0 ]; then
    rm -rf "$carry/wheels"
    mapfile -t wheels < <(sed -nE 's/^((diffusers|peft|accelerate|psutil)==[0-9.]+).*/\1/p' torchscript/requirements-test.txt)
    $PYTHON -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
        --dest "$carry/wheels" "${wheels[@]}"
fi

if [ ${#export[@]} -gt 0 ]; then
    tar --create --xz --file "$carry.tar.xz" --directory "$(dirname "$carry")" "$(basename "$carry")"
    size=$(du -sm "$carry.tar.xz" | cut -f1)
    echo "$carry.tar.xz: $size MiB"
    if [ "$size" -gt "$LIMIT_MIB" ]; then
        echo "error: more than $LIMIT_MIB MiB" >&2
        exit 1
    fi
fi

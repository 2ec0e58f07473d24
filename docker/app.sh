#!/usr/bin/env bash
# Lays out what runs: an image's /app, a release's folder. The graphs are beside it by then.
#
#   docker/app.sh OUT
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:?the folder to make}
release=${CARGO_TARGET_DIR:-target}/release
mkdir -p "$out/models"
for program in sdxl-worker sdxl-worker-engine; do
    # Line tables serve debuggers; messages have their lines without them.
    strip --strip-debug -o "$out/$program" "$release/$program"
done
cp -r models/demo "$out/models/"
cp docker/start.sh docker/ready.sh test_input.json LICENSE README.md "$out/"
python3 .ci/third_party.py "$out"

#!/usr/bin/env bash
# Packs a release for Linux: the two programs, graphs, demo model, licences, bill of materials. libtorch is not in it.
#
#   .ci/dist.sh OUT [GRAPHS]    GRAPHS is a folder of graphs to take; without it those that ship are exported
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:?the folder for the archive} graphs=${2:-}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
name=sdxl-worker-$version-linux-x86_64
folder=$out/$name

if [ -z "$graphs" ]; then
    graphs=$out/graphs
    docker/graphs.sh "$graphs"
fi
rm -rf "$folder"
mkdir -p "$folder/graphs"
cp "$graphs"/* "$folder/graphs/"
docker/app.sh "$folder"
rm "$folder/start.sh" "$folder/ready.sh" # an image's own

cat >"$folder/INSTALL.txt" <<'TEXT'
The worker needs libtorch 2.11 as PyTorch ships it with CUDA (also on a CPU), and looks for it by itself. One of these:

    pip install torch==2.11.0                 into the python3 on PATH or an active virtual environment
    export LIBTORCH=/path/to/torch            the folder of a torch package or of a libtorch archive, or
    ln -s /path/to/torch libtorch             the same as a folder libtorch beside the program

A torch for CUDA 13 needs a driver of the 580 series or newer, one for CUDA 12 of the 525 series. Then:

    ./sdxl-worker doctor                      what works here, and what to do about the rest
    ./sdxl-worker                             the picture of test_input.json, with the demo model
    ./sdxl-worker serve --model stabilityai/stable-diffusion-xl-base-1.0 --variant fp16

Graphs for all stock architectures are in graphs/, in float16. On a CPU export float32 ones from the project's sources.
TEXT

# The same bytes for the same content, whoever packs it.
tar --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -C "$out" -c "$name" | gzip -9n >"$folder.tar.gz"
(cd "$out" && sha256sum "$name.tar.gz" >"$name.tar.gz.sha256")
echo "$folder.tar.gz"

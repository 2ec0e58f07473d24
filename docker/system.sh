#!/usr/bin/env bash
# The packages of the distribution, on Debian or Ubuntu.
#
#   docker/system.sh build    what compiling, and exporting graphs, takes
#   docker/system.sh run      what running takes
set -euo pipefail

case "${1:-}" in
build) packages=(ca-certificates g++ binutils python3 python3-pip python3-venv) ;;
# HTTPS reads the certificates, libtorch links the two libraries; most bases have all three.
run) packages=(ca-certificates libstdc++6 zlib1g) ;;
*)
    echo "usage: docker/system.sh build|run" >&2
    exit 2
    ;;
esac

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq -y --no-install-recommends "${packages[@]}" >/dev/null
# An index of packages is megabytes, and old by the time somebody wants it.
rm -rf /var/lib/apt/lists/*

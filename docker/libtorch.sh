#!/usr/bin/env bash
# The shared objects of a pip-installed torch that the worker needs, in one folder: what the engine links, what that
# needs in turn, and what those load by name at run time. No Python, no headers, no compilers.
#
#   docker/libtorch.sh TORCH OUT    TORCH is site-packages/torch; makes OUT/lib
#
# Left out beside libtorch_python: libtorch_cuda_linalg with cuSOLVER (nothing here solves equations) and the plugins of
# NCCL and NVSHMEM for several machines.
set -euo pipefail

torch=${1:?the folder of torch} out=${2:?the folder to make}
packages=$(dirname "$torch")
mkdir -p "$out/lib" "$out/licences"

needed() { readelf -d "$1" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p'; }

# Where a library of this name is, torch's own first.
find_library() {
    local folder
    for folder in "$torch/lib" "$packages"/nvidia/*/lib; do
        if [ -e "$folder/$1" ]; then
            echo "$folder/$1"
            return
        fi
    done
}

# What every Linux has (docker/system.sh sees to it), and what the driver brings.
SYSTEM='^(ld-linux-x86-64|libc|libm|libdl|libpthread|librt|libutil|libstdc\+\+|libgcc_s|libz|libcuda)\.so'
is_system() { [[ $1 =~ $SYSTEM ]]; }

take() {
    local name=$1 library dependency
    if is_system "$name" || [ -e "$out/lib/$name" ]; then return; fi
    library=$(find_library "$name")
    if [ -z "$library" ]; then
        echo "libtorch needs $name, and it is neither in $torch/lib nor in $packages/nvidia/*/lib" >&2
        exit 1
    fi
    # a link where it is one file system's matter: gigabytes
    cp -L --link "$library" "$out/lib/$name" 2>/dev/null || cp -L "$library" "$out/lib/$name"
    while read -r dependency; do take "$dependency"; done < <(needed "$library")
}

# libcaffe2_nvrtc is loaded when the first kernel is compiled at run time.
for name in libtorch.so libcaffe2_nvrtc.so; do take "$name"; done
# cuDNN loads its parts by name, NVRTC its built-in code.
for library in "$packages"/nvidia/*/lib/{libcudnn_*.so.*,libnvrtc-builtins.so.*}; do
    case "$library" in *.alt.*) ;; *) take "$(basename "$library")" ;; esac
done

cp "$torch/version.py" "$out/"
for information in "$packages"/torch-*.dist-info "$packages"/nvidia_*.dist-info; do
    name=$(basename "$information" .dist-info)
    find "$information" -type f -iname '*licen[cs]e*' ! -name '*.py' -print0 |
        while IFS= read -r -d '' file; do cp "$file" "$out/licences/$name-$(basename "$file")"; done
done
du -sm "$out/lib" | awk '{ print "libtorch: " $1 " MB" }' >&2

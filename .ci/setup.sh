#!/usr/bin/env bash
# Makes what `cargo` and the Python scripts need, from nothing: `.venv` with the locked packages, and the link
# `.libtorch` to the torch in it. Does nothing, quickly, when that is already so.
#
#   .ci/setup.sh          what `make run` needs
#   .ci/setup.sh test     and what only tests and benchmarks need
#
# PYTHON names the Python to use. A LIBTORCH that is set is used as it is: with its own Python package beside it (as in
# NVIDIA's image) no other torch is installed.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly UV_VERSION=0.13.9
readonly RUST_MINOR=88

say() { printf 'setup: %s\n' "$*" >&2; }

# --- The tools that must be there -------------------------------------------------------------------------------------

is_usable_python() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if is_usable_python "$candidate"; then
            echo "$candidate"
            return
        fi
    done
}

require_tools() {
    local missing=() apt=() dnf=() other=()
    python=$(find_python)
    if [ -z "$python" ]; then
        missing+=("Python 3.11 to 3.14 (${PYTHON:-python3} is older, newer or absent; PYTHON=... names another)")
        apt+=(python3 python3-venv)
        dnf+=(python3)
    elif [ ! -x .venv/bin/python ] && ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        missing+=("the modules venv and ensurepip of $python")
        apt+=("$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')")
        dnf+=(python3)
    fi
    if ! command -v "${CXX:-c++}" >/dev/null && ! command -v g++ >/dev/null; then
        missing+=("a C++ compiler (${CXX:-c++})")
        apt+=(g++)
        dnf+=(gcc-c++)
    fi
    if ! command -v "${CC:-cc}" >/dev/null; then
        missing+=("a C compiler (${CC:-cc})")
        apt+=(gcc libc6-dev)
        dnf+=(gcc glibc-devel)
    fi
    if ! command -v cargo >/dev/null; then
        missing+=("Rust 1.$RUST_MINOR or newer (cargo)")
        other+=("Rust: rustup, from https://rustup.rs")
    elif [ "$(cargo --version | cut -d. -f2)" -lt "$RUST_MINOR" ]; then
        missing+=("Rust 1.$RUST_MINOR or newer (this is $(cargo --version))")
        other+=("Rust: rustup update, or rustup from https://rustup.rs in place of the system's package")
    fi
    if [ ${#missing[@]} -gt 0 ]; then
        printf 'error: missing on this machine:\n' >&2
        printf '    %s\n' "${missing[@]}" >&2
        printf '  install with:\n' >&2
        if [ ${#apt[@]} -gt 0 ]; then
            printf '    Debian, Ubuntu: sudo apt-get install %s\n' "${apt[*]}" >&2
            printf '    Fedora, RHEL:   sudo dnf install %s\n' "${dnf[*]}" >&2
        fi
        if [ ${#other[@]} -gt 0 ]; then printf '    %s\n' "${other[@]}" >&2; fi
        exit 3
    fi
}

# A LIBTORCH that is set wrongly would fail much later, in the build. Our own link may be made only now.
require_given_libtorch() {
    if [ -n "${LIBTORCH:-}" ] && [ "$LIBTORCH" != "$PWD/.libtorch" ] && [ ! -d "$LIBTORCH/lib" ]; then
        printf 'error: LIBTORCH is %s, and there is no libtorch in it; correct or unset it\n' "$LIBTORCH" >&2
        exit 3
    fi
}

# --- Python packages --------------------------------------------------------------------------------------------------

# The folder of a Python's torch package, found without importing it.
torch_of() {
    "$1" -c 'import importlib.util as u; s = u.find_spec("torch"); print(s.submodule_search_locations[0] if s else "")'
}

same_folder() { [ -d "$1" ] && [ -d "$2" ] && [ "$(cd "$1" && pwd -P)" = "$(cd "$2" && pwd -P)" ]; }

# A torch that is not ours to install: LIBTORCH is the package that this Python already has.
is_torch_given() { same_folder "${LIBTORCH:-}" "$(torch_of "$python")"; }

make_venv() {
    if .venv/bin/python -m pip --version >/dev/null 2>&1; then return; fi
    say "making .venv with $("$python" --version)"
    if is_torch_given; then
        "$python" -m venv --clear --system-site-packages .venv
        touch .venv/.torch-is-given
    else
        "$python" -m venv --clear .venv
    fi
}

# The lock without what a given torch brings itself.
without_torch() {
    awk '/^[A-Za-z0-9]/ { keep = $0 !~ /^(torch|triton)==|^(nvidia|cuda)-/ } keep' "$1"
}

install() {
    local lock=$1 stamp
    stamp=.venv/.installed-$(basename "$lock" .txt)
    if cmp -s "$lock" "$stamp"; then return; fi
    say "installing $lock (the first time about 3 GB are downloaded)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "uv==$UV_VERSION"
    if [ -e .venv/.torch-is-given ]; then
        without_torch "$lock" >.venv/without-torch.txt
        .venv/bin/uv pip install --python .venv/bin/python --require-hashes --no-deps -r .venv/without-torch.txt
    else
        .venv/bin/uv pip install --python .venv/bin/python --require-hashes -r "$lock"
    fi
    cp "$lock" "$stamp"
}

# --- libtorch ---------------------------------------------------------------------------------------------------------

# Where cargo and the program look when LIBTORCH is not set. A link that leads somewhere is left alone.
link_libtorch() {
    local target
    if [ -d .libtorch/lib ]; then return; fi
    if [ -d "${LIBTORCH:-}" ]; then
        target=$(cd "$LIBTORCH" && pwd -P)
    else
        target=$(torch_of .venv/bin/python)
        target=${target#"$PWD/"}
    fi
    ln -sfn "$target" .libtorch
    say "libtorch is $target"
}

require_tools
require_given_libtorch
make_venv
install torchscript/requirements.txt
if [ "${1:-}" = test ]; then install torchscript/requirements-test.txt; fi
link_libtorch

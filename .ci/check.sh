#!/usr/bin/env bash
# Rules that no compiler checks. Prints each breach; fails when there is one.
set -euo pipefail
cd "$(dirname "$0")/.."
failed=0

# breach WHAT FILES...: reports the lines on standard input.
breach() {
    local line
    while IFS= read -r line; do
        printf 'check: %s: %s\n' "$1" "$line" >&2
        failed=1
    done
}

# The launcher starts where there is no libtorch, so nothing it is made of may link it.
breach 'the launcher must not link libtorch' < <(
    grep -nE '^[^/]*\b(tch|sdxl_worker|crate::torch)::' src/main.rs src/cli.rs src/libtorch.rs src/error.rs || true)

# One release of torch, in four places that no tool compares.
torch=$(sed -n 's/^torch==//p' torchscript/requirements.in)
breach "torchscript/requirements.in says torch $torch" < <(
    for lock in torchscript/requirements.txt torchscript/requirements-test.txt; do
        grep -q "^torch==$torch " "$lock" || echo "$lock has another; make lock"
    done
    grep -q "VERSION: &str = \"${torch%.*}\"" src/libtorch.rs || echo 'src/libtorch.rs has another'
    grep -q "libtorch $torch" Cargo.toml || echo 'Cargo.toml names another beside tch')

# A lock names packages, not where they were fetched from.
breach 'a package index in a lock' < <(
    grep -nE -- '--(extra-)?index-url|--find-links|https?://' torchscript/requirements*.txt || true)

exit "$failed"

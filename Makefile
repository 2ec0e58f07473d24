# Every command of the project; `make` alone lists them. Each starts from nothing: Rust, Python 3.11 or newer and a C++
# compiler are all that is assumed. Logic is in .ci/.

PYTHON_SOURCES := $(wildcard torchscript/*.py)
VENV := .venv/bin
MODEL := models/demo
MANIFEST := graphs/manifest.json
# What a graphics card computes in, besides.
DTYPES := --dtype float32 $(if $(wildcard /proc/driver/nvidia),--dtype float16)
LOCK := $(VENV)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header

.DEFAULT_GOAL := help
.PHONY: help setup setup-test graphs build run test test-full soak lint fmt bench dist lock clean

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: ## Python packages, and the link .libtorch that cargo and the program use
	@.ci/setup.sh

graphs: $(MANIFEST) ## The default model's graphs

build: setup ## The release binaries
	cargo build --release --locked

run: $(MANIFEST) build ## Make a picture from test_input.json
	target/release/sdxl-worker generate --input test_input.json --output out

test: setup-test lint build $(MANIFEST) ## What CI runs: format, lints, tests
	cargo test --release --locked
	$(VENV)/python -m pytest tests -n auto --dist loadfile
	bench/gpu.sh --dry

test-full: setup-test build $(MANIFEST) ## All combinations and full-size models: long, and much memory
	cargo test --release --locked
	$(VENV)/python -m pytest tests --full

soak: build ## 500 jobs while the host misbehaves and the worker is restarted
	SOAK_JOBS=500 cargo test --release --locked --test worker soak:: -- --nocapture

lint: setup ## Format, clippy, and the rules of .ci/check.sh
	cargo fmt --check
	cargo clippy --release --locked --all-targets -- -D warnings
	.ci/check.sh

fmt: ## Format the Rust sources
	cargo fmt

bench: setup-test build ## Speed and memory beside diffusers, on this machine
	$(VENV)/python bench/bench.py

dist: build ## A release for Linux as an archive in dist: programs, graphs, demo model
	.ci/dist.sh dist

lock: setup ## Pin the Python packages anew, after a change of torchscript/*.in
	$(LOCK) torchscript/requirements.in -o torchscript/requirements.txt
	$(LOCK) torchscript/requirements-test.in -c torchscript/requirements.txt -o torchscript/requirements-test.txt

clean: ## Remove what was built and made; .venv and .libtorch stay
	rm -rf target graphs out dist

setup-test:
	@.ci/setup.sh test

# The script leaves what is up to date as it is, so the touch says that it has looked.
$(MANIFEST): $(wildcard $(MODEL)/*/config.json $(MODEL)/*/*/config.json) $(PYTHON_SOURCES) | setup
	$(VENV)/python torchscript/export.py --model $(MODEL) $(DTYPES) --out graphs
	@touch $@

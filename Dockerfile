# syntax=docker/dockerfile:1
# Two images of one worker, without weights; docs/deploy.md says which to take.
#
#   docker build --platform linux/amd64 -t sdxl-worker .                 slim: CUDA's base and libtorch alone
#   docker build --platform linux/amd64 -t sdxl-worker --target ngc .    on NVIDIA's PyTorch image, with its libtorch
#
# Each compiles on its own base, since the two libtorch are not taken for equal. Every step is a script in docker/ that
# the tests run without Docker.

# NVIDIA's PyTorch image. 26.02 and 26.03 have torch 2.11.
ARG NGC_TAG=26.03-py3
# CUDA of the slim image: 12.6.3, 12.8.1 or 13.0.2. 13 needs drivers of the 580 series, and many hosts are older.
ARG CUDA=12.8.1
ARG UBUNTU=24.04
ARG RUST_TAG=1.95-slim-bookworm

FROM rust:${RUST_TAG} AS rust

# --- On NVIDIA's image ------------------------------------------------------------------------------------------------

FROM nvcr.io/nvidia/pytorch:${NGC_TAG} AS ngc-build
COPY --from=rust /usr/local/cargo /usr/local/cargo
COPY --from=rust /usr/local/rustup /usr/local/rustup
ENV CARGO_HOME=/usr/local/cargo RUSTUP_HOME=/usr/local/rustup PATH=/usr/local/cargo/bin:$PATH
WORKDIR /src
COPY docker/system.sh docker/
RUN docker/system.sh build
COPY . .
ARG GIT_COMMIT
RUN docker/build.sh /app

FROM nvcr.io/nvidia/pytorch:${NGC_TAG} AS ngc
# The base's own entry point stays: it brings the newer user half of the driver to data-centre cards with an older one.
ENV PATH=/app:$PATH LIBTORCH=/usr/local/lib/python3.12/dist-packages/torch
COPY --from=ngc-build /app /app
WORKDIR /app
# An image that cannot paint on a CPU is not worth pushing.
RUN ./start.sh >/dev/null
EXPOSE 8000
CMD ["/app/start.sh"]

# --- Slim: the last one, and so what RunPod builds --------------------------------------------------------------------

FROM nvidia/cuda:${CUDA}-base-ubuntu${UBUNTU} AS slim-build
COPY --from=rust /usr/local/cargo /usr/local/cargo
COPY --from=rust /usr/local/rustup /usr/local/rustup
ENV CARGO_HOME=/usr/local/cargo RUSTUP_HOME=/usr/local/rustup PATH=/usr/local/cargo/bin:$PATH
WORKDIR /src
COPY docker/system.sh docker/
RUN docker/system.sh build
COPY docker/torch.sh docker/libtorch.sh docker/
COPY torchscript/requirements.in torchscript/
ARG CUDA
# Has a folder for each CUDA: cu126, cu128, cu130.
ARG TORCH_INDEX=https://download.pytorch.org/whl
RUN docker/torch.sh "$CUDA" "$TORCH_INDEX" && docker/libtorch.sh /usr/local/lib/python3.12/dist-packages/torch /libtorch
COPY . .
ARG GIT_COMMIT
RUN docker/build.sh /app

FROM nvidia/cuda:${CUDA}-base-ubuntu${UBUNTU} AS slim
COPY docker/system.sh /tmp/
RUN /tmp/system.sh run
ENV PATH=/app:$PATH NVIDIA_DRIVER_CAPABILITIES=compute,utility
# A layer of its own, and first: gigabytes that stay the same from release to release.
COPY --from=slim-build /libtorch /app/libtorch
COPY --from=slim-build /app /app
WORKDIR /app
RUN ./start.sh >/dev/null
EXPOSE 8000
CMD ["/app/start.sh"]

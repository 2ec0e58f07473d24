#!/bin/sh
# What the image runs: the RunPod worker, which away from RunPod makes the picture of test_input.json, or, with
# SERVE_API_LOCALLY=true, the local API and its page on every interface of the container.
set -eu
cd "$(dirname "$0")"

case "${SERVE_API_LOCALLY:-}" in
true | True | 1) exec ./sdxl-worker serve --host 0.0.0.0 "$@" ;;
*) exec ./sdxl-worker "$@" ;;
esac

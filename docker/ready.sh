#!/usr/bin/env bash
# Whether the local API takes jobs: for health checks that take every 2xx for a yes. /ping says 204 while the model
# loads, and 200 once it is ready. The image has no curl.
set -euo pipefail

exec 3<>"/dev/tcp/127.0.0.1/${PORT:-8000}"
printf 'GET /ping HTTP/1.0\r\nHost: localhost\r\n\r\n' >&3
read -r -t 5 _ status _ <&3
[ "$status" = 200 ]

#!/usr/bin/env bash
# Runs a command in another root, in namespaces of its own: it sees nothing of this machine but the network, /dev, and the
# folders that are named. What it mounts ends with it. Needs root.
#
#   in_root.sh ROOT [FOLDER:TARGET]... -- COMMAND...
set -euo pipefail

if [ "${1:-}" != --inside ]; then exec unshare --mount --pid --fork --kill-child "$0" --inside "$@"; fi
shift
root=$1
shift

while [ "$1" != -- ]; do
    mkdir -p "$root${1#*:}"
    mount --bind "${1%%:*}" "$root${1#*:}"
    shift
done
shift

cp -L /etc/resolv.conf "$root/etc/resolv.conf"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
exec chroot "$root" /usr/bin/env -i HOME=/root LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"

#!/usr/bin/env bash
# Makes a bare Debian 12 ready: the checkout given as the only argument is built, and both daemons
# are installed with their units, enabled and started. Safe to run again.
set -euo pipefail

checkout=${1:?usage: provision.sh CHECKOUT}
export DEBIAN_FRONTEND=noninteractive

if ! command -v make git >/dev/null; then
    apt-get update -q
    apt-get install -q -y --no-install-recommends make git ca-certificates
fi

make -C "$checkout" setup
make -C "$checkout" install
systemctl enable --now nodeagent.service ztunnel.service
systemctl --no-pager --lines=0 status nodeagent.service ztunnel.service

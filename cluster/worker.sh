#!/usr/bin/env bash
# Join this machine to a running cluster.
#
#   cluster/worker.sh HEAD_IP[:PORT] [any `ray start` option]
#
# The token must be here already: ~/.ray/auth_token copied from the head (scp), or RAY_AUTH_TOKEN.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ $# -ge 1 && $1 != -* ]] || die "the head's address is missing: worker.sh HEAD_IP[:PORT] [ray start options]"
given=$1
shift
case $given in
    \[*\]:*) host=${given%]:*} host=${host#[} port=${given##*]:} ;;
    \[*\]) host=${given#[} host=${host%]} port=6379 ;;
    *:*:*) host=$given port=6379 ;; # IPv6 without brackets
    *:*) host=${given%:*} port=${given##*:} ;;
    *) host=$given port=6379 ;;
esac
[[ $port =~ ^[0-9]+$ ]] || die "'$given' has no port number behind the colon: worker.sh HEAD_IP[:PORT]"
head=$(with_port "$host" "$port")

use_ray
require_token_mode
has_token || die "this machine has no token; copy the head's: scp HEAD:.ray/auth_token ~/.ray/auth_token"
protect_token
# A head of this machine alone may get a second node here.
! is_loopback "$host" || running "$state/head.pid" || die "$host is this machine itself, and no head was started here; give the head's address as head.sh prints it"
why=$(python "$here/addresses.py" reach "$host" "$port") || die "the head at $head can't be reached from here: $why"
choose_interface "$host"

start worker --address "$head" "$@"
echo "This machine has joined $head${GLOO_SOCKET_IFNAME:+ (collectives over $GLOO_SOCKET_IFNAME)}; log: $state/worker.log; leave: cluster/stop.sh worker"

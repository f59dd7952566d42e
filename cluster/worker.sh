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
head=$1
shift
[[ $head == *:* ]] || head=$head:6379

use_ray
require_token_mode
has_token || die "this machine has no token; copy the head's: scp HEAD:.ray/auth_token ~/.ray/auth_token"
choose_interface "${head%:*}"

start worker --address "$head" "$@"
echo "This machine has joined $head${GLOO_SOCKET_IFNAME:+ (collectives over $GLOO_SOCKET_IFNAME)}; log: $state/worker.log; leave: cluster/stop.sh worker"

#!/usr/bin/env bash
# Start the head node of a Ray cluster on this machine, with token authentication.
#
#   cluster/head.sh [--node-ip-address IP] [any other `ray start` option]
#
# The dashboard, to which jobs are submitted, listens on 127.0.0.1:8265 only; see README.md for how to reach it.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

use_ray
require_token_mode
make_token

# Ray's choice of address, unless the caller names one (each option may be "--name value" or "--name=value")
ip=$(own_ip)
previous=
for option in "$@"; do
    [[ $previous != --node-ip-address || $option == 127.* ]] || ip=$option
    [[ $option != --node-ip-address=* || $option == *=127.* ]] || ip=${option#*=}
    previous=$option
done
choose_interface "$ip"

start head --head "$@"
# what Ray says it listens on, colour codes taken out
said=$(sed 's/\x1b\[[0-9;]*m//g' "$state/head.log")
address=$(sed -n "s/.*ray start --address='\([^']*\)'.*/\1/p" <<<"$said" | head -n 1)
dashboard=$(sed -n "s/.*RAY_API_SERVER_ADDRESS='\([^']*\)'.*/\1/p" <<<"$said" | head -n 1)
port=${dashboard##*:}

cat <<END
The head is up at $address${GLOO_SOCKET_IFNAME:+ (collectives over $GLOO_SOCKET_IFNAME)}; log: $state/head.log
  another machine joins:  cluster/worker.sh $address     (with a copy of this machine's $(token_file))
  submit from here:       rlhf-ray submit RECIPE --address $dashboard --run-dir /shared/runs/NAME
  submit from elsewhere:  ssh -N -L $port:127.0.0.1:$port $(hostname)   first
  stop:                   cluster/stop.sh
END

#!/usr/bin/env bash
# Start the head node of a Ray cluster on this machine, with token authentication.
#
#   cluster/head.sh [--node-ip-address IP] [any other `ray start` option]
#
# Without --node-ip-address the head takes the address by which other machines reach this one, and refuses to start where there is
# none. With --node-ip-address 127.0.0.1 it is a cluster of this machine alone.
#
# The dashboard, to which jobs are submitted, listens on 127.0.0.1:8265 only; see README.md for how to reach it.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

use_ray
require_token_mode
make_token

ip=
previous= # each option may be "--name value" or "--name=value"
for option in "$@"; do
    [[ $previous != --node-ip-address ]] || ip=$option
    [[ $option != --node-ip-address=* ]] || ip=${option#*=}
    previous=$option
done
if [[ -z $ip ]]; then
    ip=$(own_ip) || die "this machine has no address that others could reach, only loopback; bring its network up, or start a cluster of this machine alone with --node-ip-address 127.0.0.1"
    set -- --node-ip-address "$ip" "$@"
fi
choose_interface "$ip"

start head --head "$@"
# what Ray says it listens on, colour codes taken out
said=$(sed 's/\x1b\[[0-9;]*m//g' "$state/head.log")
address=$(sed -n "s/.*ray start --address='\([^']*\)'.*/\1/p" <<<"$said" | head -n 1)
dashboard=$(sed -n "s/.*RAY_API_SERVER_ADDRESS='\([^']*\)'.*/\1/p" <<<"$said" | head -n 1)
port=${dashboard##*:}

if is_loopback "$ip"; then
    others="only this machine: $ip is loopback; for several, --node-ip-address and one of: $(own_addresses)"
else
    others="cluster/worker.sh $address     (with a copy of this machine's $(token_file))"
    [[ $(own_addresses) != *,* ]] || others+=$'\n'"                          can't it reach that? --node-ip-address and another of: $(own_addresses)"
fi

cat <<END
The head is up at $address${GLOO_SOCKET_IFNAME:+ (collectives over $GLOO_SOCKET_IFNAME)}; log: $state/head.log
  another machine joins:  $others
  who is there:           RAY_AUTH_MODE=token ray status --address $address
  submit from here:       rlhf-ray submit RECIPE --address $dashboard --run-dir /shared/runs/NAME
  submit from elsewhere:  ssh -N -L $port:127.0.0.1:$port $(hostname)   first
  stop:                   cluster/stop.sh
END

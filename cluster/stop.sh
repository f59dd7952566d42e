#!/usr/bin/env bash
# Stop what head.sh and worker.sh started on this machine, and nothing else (`ray stop` ends every Ray process there is).
#
#   cluster/stop.sh [head|worker]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

stopped=0
for name in ${1:-worker head}; do
    file=$state/$name.pid
    if running "$file"; then
        read -r pid <"$file"
        kill -TERM "$pid" # `ray start --block` ends its processes when it is told to end
        waited=0
        while running "$file"; do
            if ((waited >= 60)); then
                kill -KILL -- "-$pid" 2>/dev/null || true # its process group; Ray's reaper does the rest
                break
            fi
            sleep 0.5
            waited=$((waited + 1))
        done
        echo "stopped the $name ($pid)"
        stopped=1
    fi
    rm -f "$file"
done
((stopped)) || echo "nothing that was started from here is running"

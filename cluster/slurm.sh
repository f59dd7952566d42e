#!/usr/bin/env bash
#SBATCH --job-name=rlhf_ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
##SBATCH --gpus-per-node=4
#SBATCH --time=08:00:00
#SBATCH --signal=B:INT@600
#SBATCH --requeue
#SBATCH --open-mode=append
#
# A Ray cluster inside a Slurm allocation, and one run on it. From the clone, on a file system that the nodes share:
#
#   sbatch cluster/slurm.sh RECIPE RUN_DIR [any other `rlhf-ray run` option]
#
# The batch step is head and driver; every other node is a worker. Ten minutes before the time limit the run gets the
# Ctrl-C that makes it write a checkpoint, and the job goes back into the queue and resumes.
set -euo pipefail

# sbatch runs a copy of this file, so the folder is found from where the job was submitted.
cluster=${RLHF_RAY_CLUSTER:-$SLURM_SUBMIT_DIR/cluster}
state=${TMPDIR:-/tmp}/rlhf_ray_$SLURM_JOB_ID
export RLHF_RAY_STATE=$state
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$cluster/common.sh"

[[ $# -ge 2 ]] || die "usage: sbatch cluster/slurm.sh RECIPE RUN_DIR [rlhf-ray run options]"
recipe=$1
run_dir=$2
shift 2
[[ $run_dir == /* || $run_dir == *://* ]] || die "RUN_DIR '$run_dir' is relative; give the path by which every node sees it"

use_ray
require_token_mode
make_token
RAY_AUTH_TOKEN=$(ray get-auth-token)
export RAY_AUTH_TOKEN # the workers' tasks inherit it, shared home or not

ip=$(own_ip) || ip=127.0.0.1
port=$((20000 + SLURM_JOB_ID % 4000 * 4)) # several jobs of one user may share a node
cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
nodes=${SLURM_JOB_NUM_NODES:-1}
((nodes == 1)) || ! is_loopback "$ip" || die "$(hostname) has no address that the other $((nodes - 1)) node(s) could reach, only loopback"
run=
workers=

# shellcheck disable=SC2329 # by the trap
leave() {
    trap '' INT TERM
    [[ -z $workers ]] || kill "$workers" 2>/dev/null || true
    "$cluster/stop.sh" head
    rm -rf "/tmp/ray_$SLURM_JOB_ID" "$state"
}
trap leave EXIT

choose_interface "$ip"
"$cluster/stop.sh" >/dev/null # what a first try of this job, requeued, may have left
start head --head --node-ip-address "$ip" --port "$port" --ray-client-server-port $((port + 1)) \
    --dashboard-agent-listen-port $((port + 2)) --include-dashboard false --num-cpus "$cpus" \
    --temp-dir "/tmp/ray_$SLURM_JOB_ID"
forget_interface # each worker finds its own

if ((nodes > 1)); then
    # shellcheck disable=SC2016 # expands on the node
    srun --nodes=$((nodes - 1)) --ntasks=$((nodes - 1)) --ntasks-per-node=1 --cpus-per-task="$cpus" --overlap \
        --exclude="${SLURMD_NODENAME:-$(hostname)}" \
        bash -c 'source "$1/common.sh"; use_ray; choose_interface "$2"
                 exec ray start --block --disable-usage-stats --address "$(with_port "$2" "$3")" --num-cpus "$4" \
                     --dashboard-agent-listen-port $(($3 + 3))' \
        worker "$cluster" "$ip" "$port" "$cpus" >"$state/workers.log" 2>&1 &
    workers=$!
fi

python - "$(with_port "$ip" "$port")" "$nodes" <<'END' || { tail -n 15 "$state"/*.log >&2; exit 1; }
import sys, time, ray

address, expected = sys.argv[1], int(sys.argv[2])
ray.init(address=address, logging_level="error")
deadline = time.monotonic() + 300
while (alive := sum(node["Alive"] for node in ray.nodes())) < expected:
    if time.monotonic() > deadline:
        sys.exit(f"waited 300 s for {expected} nodes, {alive} have joined")
    time.sleep(1)
print(f"{alive} nodes: {ray.cluster_resources()}", flush=True)
END

set -m # else the run would be started deaf to SIGINT
rlhf-ray run "$recipe" --address "$(with_port "$ip" "$port")" --run-dir "$run_dir" "$@" </dev/null &
run=$!
set +m
asked=0
trap 'asked=1; kill -INT "$run" 2>/dev/null || true' INT TERM
status=0
while true; do
    wait "$run" && status=0 || status=$?
    kill -0 "$run" 2>/dev/null || break # a trap, too, ends `wait`
done
# Asked to stop by the time limit, and stopped with a checkpoint: go on in a later slot.
if ((asked && status == 130)); then
    trap - EXIT
    leave # before Slurm ends what is left of this try
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

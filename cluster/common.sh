# Shared by head.sh, worker.sh and stop.sh; sourced, not run.
# shellcheck shell=bash

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
state=${RLHF_RAY_STATE:-${XDG_STATE_HOME:-$HOME/.local/state}/rlhf_ray} # pid files and logs of what we started

die() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

# The environment that ray runs in is the one whose `python` the jobs get: the active one, else the clone's .venv/.
use_ray() {
    if [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -x $here/../.venv/bin/ray ]]; then
        PATH=$(cd "$here/../.venv/bin" && pwd):$PATH
        export PATH
    fi
    command -v ray >/dev/null || die "there is no ray here; run 'make install' in the clone, or activate an environment that has rlhf-ray"
}

token_file() {
    echo "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
}

has_token() {
    [[ -n ${RAY_AUTH_TOKEN:-} || -s $(token_file) ]]
}

make_token() {
    has_token || [[ -n ${RAY_AUTH_TOKEN_PATH:-} ]] || (umask 077 && ray get-auth-token --generate &>/dev/null) || true
    has_token || die "there is no token in RAY_AUTH_TOKEN or $(token_file), and none could be made; 'ray get-auth-token --generate' says why"
    protect_token
}

protect_token() { # takes others' rights to the token's file; a warning where they stay
    local file mode
    file=$(token_file)
    [[ -z ${RAY_AUTH_TOKEN:-} && -e $file ]] || return 0
    chmod go-rwx "$file" 2>/dev/null || true
    mode=$(ls -lLd "$file")
    [[ ${mode:4:6} == ------ ]] ||
        echo "$(basename "$0"): $file can be read by others (${mode:0:10}), who can then run code on the cluster; its owner should run: chmod 600 $file" >&2
}

# Without a token anyone who reaches a Ray port runs code on the cluster, and `ray start` only warns. We refuse.
require_token_mode() {
    [[ ${RAY_AUTH_MODE:-token} == token ]] || die "RAY_AUTH_MODE=$RAY_AUTH_MODE would leave the cluster open to anyone who reaches its ports; unset it"
    export RAY_AUTH_MODE=token
}

own_addresses() { # "eth0 10.0.0.1, ib0 10.1.0.1": those by which other machines may reach this one, the best first
    python "$here/addresses.py" list | paste -s -d , | sed 's/,/, /g'
}

own_ip() { # the best of them; nothing and status 1 where there is none but loopback
    python "$here/addresses.py" head
}

is_loopback() {
    [[ $1 == 127.* || $1 == localhost || $1 == ::1 || $1 == "[::1]" ]]
}

with_port() { # HOST PORT -> HOST:PORT, an IPv6 address in brackets
    [[ $1 == *:* ]] && echo "[$1]:$2" || echo "$1:$2"
}

# gloo and NCCL (the collective libraries of CPUs and GPUs) pick their interface by the host's name or by their own rules, which
# is often wrong on several machines. Every node takes the interface that leads to the head; what you set yourself stays.
interfaces_set=()
choose_interface() { # address of the head, or of this machine
    local device
    device=$(python "$here/addresses.py" interface "$1" 2>/dev/null) || true
    [[ -n $device ]] || return 0
    [[ -n ${GLOO_SOCKET_IFNAME:-} ]] || { export GLOO_SOCKET_IFNAME=$device && interfaces_set+=(GLOO_SOCKET_IFNAME); }
    # With "=": of this name, not of all that begin with it.
    [[ -n ${NCCL_SOCKET_IFNAME:-} ]] || { export NCCL_SOCKET_IFNAME="=$device" && interfaces_set+=(NCCL_SOCKET_IFNAME); }
}

forget_interface() { # what choose_interface has set
    ((${#interfaces_set[@]} == 0)) || unset "${interfaces_set[@]}"
}

started_at() { # when process $1 started, or nothing: tells our process from a later one with its number
    ps -o lstart= -p "$1" 2>/dev/null || true
}

running() { # is what the pid file $1 names still the process that we started?
    [[ -s $1 ]] || return 1
    local pid start
    { read -r pid && read -r start; } <"$1" || return 1
    [[ -n $start && $(started_at "$pid") == "$start" ]]
}

# start NAME OPTIONS...: `ray start --block OPTIONS` in the background; returns when the node is up.
start() {
    local name=$1 why='' attempt
    shift
    mkdir -p "$state"
    ! running "$state/$name.pid" || die "a $name started from here is already running; stop it with $here/stop.sh $name"
    for attempt in 1 2 3; do
        if launch "$name" "$@"; then
            return
        fi
        ((attempt < 3)) && grep -qE "timed out during startup|Timed out waiting for" "$state/$name.log" || break
        # Each waits 30 s for another. The next ones, whose files are then in memory, are faster.
        echo "$(basename "$0"): Ray's processes did not find each other in time; they are started again" >&2
    done
    tail -n 15 "$state/$name.log" >&2
    die "the $name $why; its log is $state/$name.log"
}

launch() { # NAME OPTIONS...: status 1 and the reason in `why` where it does not come up; nothing is left of it then
    local name=$1 pid waited=0
    shift
    why=
    # Job control: without it bash starts background processes deaf to SIGINT, and with them every job of the cluster,
    # which could then not be asked to write a checkpoint and stop.
    set -m
    PYTHONUNBUFFERED=1 ray start --block --disable-usage-stats "$@" >"$state/$name.log" 2>&1 </dev/null &
    pid=$!
    set +m
    disown "$pid"
    printf '%s\n%s\n' "$pid" "$(started_at "$pid")" >"$state/$name.pid"

    until [[ -n $why ]] || grep -q "Ray runtime started" "$state/$name.log"; do
        if ! kill -0 "$pid" 2>/dev/null || ((waited >= 180)); then
            why="did not start within $((waited / 2)) s"
        fi
        sleep 0.5
        waited=$((waited + 1))
    done
    # A second after it has said so (later on a busy machine), Ray looks at its processes for the first time, and ends them all
    # where one has ended.
    [[ -n $why ]] || sleep "${RLHF_RAY_SETTLE_S:-4}"
    if [[ -z $why ]] && { ! kill -0 "$pid" 2>/dev/null || grep -q "exited unexpectedly" "$state/$name.log"; }; then
        why="ended right after its start"
    fi
    [[ -n $why ]] || return 0
    kill -KILL -- "-$pid" 2>/dev/null || true # its process group
    rm -f "$state/$name.pid"
    return 1
}

"""The address that a head takes: one that others can reach, also where there is no default route; loopback is refused."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_cluster import CLUSTER, bare_env, free_ports, script

ADDRESSES = str(CLUSTER / "addresses.py")


def in_a_network(*set_up, command):
    """The command in a network of its own, set up so."""
    if subprocess.run(["unshare", "--net", "ip", "link"], capture_output=True, check=False).returncode:
        pytest.skip("no right to make a network namespace, or no ip command")
    lines = ["ip link set lo up", *set_up, f"exec {command}"]
    return subprocess.run(["unshare", "--net", "bash", "-ec", "\n".join(lines)], capture_output=True, text=True, timeout=60,
                          check=False)  # fmt: skip


def card(name, address, kind=None):
    """A network card, or the bridge that a container engine makes."""
    kind = kind or f"veth peer name far{name}"
    return [f"ip link add {name} type {kind}", f"ip addr add {address} dev {name} {'nodad' if ':' in address else ''}",
            f"ip link set {name} up", f"ip link set far{name} up 2>/dev/null || true"]  # fmt: skip


def python(*arguments):
    return f"{sys.executable} {ADDRESSES} {' '.join(arguments)}"


def test_without_a_default_route_it_is_the_address_of_the_card():
    found = in_a_network(*card("eth7", "10.9.8.7/24"), command=python("head"))
    assert (found.returncode, found.stdout) == (0, "10.9.8.7\n"), found.stderr


def test_only_loopback_is_none():
    found = in_a_network(command=python("head"))
    assert (found.returncode, found.stdout) == (1, "\n")


def test_what_containers_are_behind_comes_last():
    cards = [*card("docker0", "172.17.0.1/16", "bridge"), *card("br-0123456789ab", "172.18.0.1/16", "bridge"),
             *card("ib0", "10.1.0.2/24")]  # fmt: skip
    found = in_a_network(*cards, command=python("list"))
    assert found.stdout.splitlines()[0] == "ib0 10.1.0.2" and len(found.stdout.splitlines()) == 3, found.stderr
    # Where it is all there is, it is taken.
    assert in_a_network(*card("docker0", "172.17.0.1/16", "bridge"), command=python("head")).stdout == "172.17.0.1\n"


def test_the_default_route_decides_between_several():
    cards = [*card("eth0", "10.1.0.2/24"), *card("eth1", "10.2.0.2/24"), "ip route add default via 10.2.0.1"]
    assert in_a_network(*cards, command=python("head")).stdout == "10.2.0.2\n"


def test_ipv6_alone():
    found = in_a_network(*card("eth0", "fd00::7/64"), command=python("list"))
    assert found.stdout == "eth0 fd00::7\n", found.stderr  # not its fe80:: address
    assert in_a_network(*card("eth0", "fd00::7/64"), command=python("interface", "fd00::9")).stdout == "eth0\n"


def test_collectives_take_the_interface_that_leads_to_the_head():
    cards = [*card("eth0", "10.1.0.2/24"), *card("eth1", "10.2.0.2/24")]
    for head, device in (("10.2.0.9", "eth1"), ("10.1.0.2", "eth0")):
        code = f"source {CLUSTER / 'common.sh'}; choose_interface {head}; echo $GLOO_SOCKET_IFNAME $NCCL_SOCKET_IFNAME"
        found = in_a_network(*cards, command=f"env PATH={Path(sys.executable).parent}:$PATH bash -c '{code}'")
        assert found.stdout == f"{device} ={device}\n", found.stderr
    own = f"source {CLUSTER / 'common.sh'}; choose_interface 10.2.0.9; echo $GLOO_SOCKET_IFNAME $NCCL_SOCKET_IFNAME; "
    own += "forget_interface; env"
    found = in_a_network(*cards, command=f"env NCCL_SOCKET_IFNAME=mine bash -c '{own}'")
    assert found.stdout.startswith("eth1 mine\n") and "NCCL_SOCKET_IFNAME=mine" in found.stdout
    assert "GLOO_SOCKET_IFNAME=" not in found.stdout


def test_a_head_of_loopback_alone_is_refused(tmp_path):
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("x" * 64)
    environment = " ".join(f"{name}='{value}'" for name, value in bare_env(tmp_path).items()
                           if name in ("HOME", "PATH", "VIRTUAL_ENV", "RLHF_RAY_STATE"))  # fmt: skip
    found = in_a_network(command=f"env {environment} bash {CLUSTER / 'head.sh'}")
    assert found.returncode == 2 and "only loopback" in found.stderr and "--node-ip-address 127.0.0.1" in found.stderr
    assert not (tmp_path / "state").exists(), "nothing was started"


def test_a_head_that_is_not_there_is_told_within_seconds(tmp_path):
    env = bare_env(tmp_path) | {"RAY_AUTH_TOKEN": "x" * 64}
    own = subprocess.run([sys.executable, ADDRESSES, "head"], capture_output=True, text=True, check=False).stdout.strip()
    (port,) = free_ports(1)
    if own and ":" not in own:
        refused = script("worker.sh", f"{own}:{port}", env=env, timeout=15)
        assert refused.returncode == 2 and "nothing listens there" in refused.stderr and "head.sh" in refused.stderr
    loop = script("worker.sh", f"127.0.0.1:{port}", env=env, timeout=15)
    assert loop.returncode == 2 and "is this machine itself" in loop.stderr
    for given, says in (("nosuch.invalid", "no machine of that name"), ("10.0.0.1:port", "no port number")):
        answer = script("worker.sh", given, env=env, timeout=30)
        assert answer.returncode == 2 and says in answer.stderr, answer.stderr
    assert not (tmp_path / "state").exists(), "nothing was started"


def test_no_route_is_told_with_the_interfaces_that_are_there(tmp_path):
    found = in_a_network(*card("eth0", "10.1.0.2/24"), command=python("reach", "10.5.0.1", "6379"))
    assert found.returncode == 1 and "unreachable" in found.stdout and "eth0 10.1.0.2" in found.stdout


RAY = """#!/bin/bash
# What head.sh needs of `ray start --head`.
ip=
for option in "$@"; do
    [[ $before != --node-ip-address ]] || ip=$option
    [[ $option != --node-ip-address=* ]] || ip=${option#*=}
    before=$option
done
echo "asked for $(grep -o -e --node-ip-address <<<"$*" | wc -l) address: $ip over $GLOO_SOCKET_IFNAME and $NCCL_SOCKET_IFNAME"
echo "  ray start --address='$ip:6379'"
echo "RAY_API_SERVER_ADDRESS='http://127.0.0.1:8265'"
echo "Ray runtime started."
[[ $* != *--short-lived* ]] || { sleep 0.5; echo "Some Ray subprocesses exited unexpectedly:"; exit 1; }
[[ $* != *--late* || -e $HOME/late ]] || { touch $HOME/late; echo "RuntimeError: Timed out waiting for node info"; exit 1; }
sleep 30
"""
TWO_CARDS = [*card("eth0", "10.1.0.2/24"), *card("eth1", "10.2.0.2/24")]


def head_sh(folder, cards, options):
    """head.sh with RAY in Ray's place, what it was asked for, and stop.sh."""
    (folder / "bin").mkdir()
    (folder / "bin" / "ray").write_text(RAY)
    (folder / "bin" / "ray").chmod(0o755)
    own = bare_env(folder) | {"RAY_AUTH_TOKEN": "x" * 64, "PATH": f"{folder / 'bin'}:{bare_env(folder)['PATH']}"}
    own["RLHF_RAY_SETTLE_S"] = "1"
    names = ("HOME", "PATH", "VIRTUAL_ENV", "RLHF_RAY_STATE", "RAY_AUTH_TOKEN", "RLHF_RAY_SETTLE_S")
    environment = shlex.join(f"{name}={own[name]}" for name in names)
    steps = f"bash {CLUSTER / 'head.sh'} {options}; cat {folder}/state/head.log; bash {CLUSTER / 'stop.sh'}"
    return in_a_network(*cards, command=f"env -u GLOO_SOCKET_IFNAME -u NCCL_SOCKET_IFNAME {environment} bash -c '{steps}'")


def test_a_head_that_ends_right_after_its_start_is_not_said_to_be_up(tmp_path):
    found = head_sh(tmp_path, [], "--node-ip-address 127.0.0.1 --short-lived")
    assert "The head is up" not in found.stdout and "nothing that was started from here" in found.stdout
    assert "the head ended right after its start" in found.stderr and "Some Ray subprocesses exited" in found.stderr


def test_a_head_whose_processes_were_too_late_for_each_other_is_started_again(tmp_path):
    found = head_sh(tmp_path, [], "--node-ip-address 127.0.0.1 --late")
    assert found.stderr.count("they are started again") == 1 and "The head is up at 127.0.0.1:6379" in found.stdout, found.stderr
    assert "stopped the head" in found.stdout


@pytest.mark.parametrize(
    ("cards", "options", "address", "device", "says"),
    [
        pytest.param(TWO_CARDS, "", "10.1.0.2", "eth0", "another of: eth0 10.1.0.2, eth1 10.2.0.2", marks=pytest.mark.thorough),
        ([*TWO_CARDS, "ip route add default via 10.2.0.1"], "", "10.2.0.2", "eth1", "another of: eth1 10.2.0.2, eth0 10.1.0.2"),
        pytest.param(TWO_CARDS, "--node-ip-address=10.2.0.2 --num-cpus 1", "10.2.0.2", "eth1", "cluster/worker.sh 10.2.0.2:6379",
                     marks=pytest.mark.thorough),
        (TWO_CARDS, "--node-ip-address 127.0.0.1", "127.0.0.1", "lo", "only this machine: 127.0.0.1 is loopback; for several, "
         "--node-ip-address and one of: eth0 10.1.0.2, eth1 10.2.0.2"),
        pytest.param([], "--node-ip-address=127.0.0.1", "127.0.0.1", "lo", "only this machine", marks=pytest.mark.thorough),
    ],
)  # fmt: skip
def test_what_head_sh_makes_of_the_interfaces_that_are_there(tmp_path, cards, options, address, device, says):
    found = head_sh(tmp_path, cards, options)
    assert f"asked for 1 address: {address} over {device} and ={device}" in found.stdout, found.stderr
    assert f"The head is up at {address}:6379 (collectives over {device})" in found.stdout and says in found.stdout
    assert f"ray status --address {address}:6379" in found.stdout and "stopped the head" in found.stdout


BOTH_HOSTS = """
import ray
ray.init(address="10.9.8.7:6379", logging_level="ERROR")
where = ray.remote(num_cpus=1)(lambda: ray.util.get_node_ip_address())
parts = ray.util.placement_group([{"CPU": 1}] * 2, strategy="STRICT_SPREAD")
place = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
print("work on", *sorted(ray.get([
    where.options(scheduling_strategy=place(parts, part)).remote() for part in (0, 1)
], timeout=300)))
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_head_without_a_default_route_gets_a_worker_of_another_host_as_it_says(tmp_path):
    """Two hosts are two network namespaces that one cable joins; neither has a default route."""
    import tempfile

    if subprocess.run(["unshare", "--net", "ip", "link"], capture_output=True, check=False).returncode:
        pytest.skip("no right to make a network namespace, or no ip command")
    (tmp_path / "both.py").write_text(BOTH_HOSTS)
    with tempfile.TemporaryDirectory(prefix="rlhf", dir="/tmp", ignore_cleanup_errors=True) as short:
        environment = bare_env(Path(short)) | {"RAY_AUTH_MODE": "token"}
        small = "--num-cpus 1 --object-store-memory 100000000 --temp-dir"
        worker = f"ip link set lo up; ip addr add 10.9.8.8/24 dev eth3; ip link set eth3 up; $joins {small} {short}/worker"
        found = subprocess.run(["unshare", "--net", "bash", "-ec", f"""
            cd {CLUSTER.parent}
            unshare --net sleep 800 & other=$!
            trap 'cluster/stop.sh; kill $other' EXIT
            sleep 1
            ip link set lo up
            ip link add eth7 type veth peer name eth3
            ip link set eth3 netns $other
            ip addr add 10.9.8.7/24 dev eth7
            ip link set eth7 up
            said=$(bash cluster/head.sh {small} {short}/head)
            echo "$said"
            export joins="bash $(grep -o 'cluster/worker.sh [0-9.:]*' <<<"$said")"
            nsenter --net --target $other bash -ec {shlex.quote(worker)}
            $(grep -o 'ray status --address .*' <<<"$said")
            python {tmp_path}/both.py
        """], env=environment, capture_output=True, text=True, timeout=800, check=False)  # fmt: skip
    assert "cluster/worker.sh 10.9.8.7:6379" in found.stdout and "collectives over eth7" in found.stdout, found.stderr
    assert "has joined 10.9.8.7:6379 (collectives over eth3)" in found.stdout, found.stderr
    assert "Active:\n 1 node_" in found.stdout, "`ray status` as the head tells it"
    assert "work on 10.9.8.7 10.9.8.8" in found.stdout, found.stderr
    assert "stopped the worker" in found.stdout and "stopped the head" in found.stdout

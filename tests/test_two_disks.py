"""Two hosts that share nothing but a network and a store: each has a disk and shared memory of its own, and can write nowhere else.

Hosts are namespaces of Linux (network and mounts), the store is moto's S3 server on the first of them.
"""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from processes import wait_for
from test_cluster import CLUSTER, bare_env

from rlhf_ray.runs.sealed import MANIFEST

pytest.importorskip("moto.server", reason="needs moto's S3 server: pip install 'moto[server]'")
pytest.importorskip("s3fs", reason="needs the extra 's3': pip install s3fs")
pytestmark = [
    pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3000),
    pytest.mark.skipif(
        sys.platform != "linux"
        or subprocess.run(["unshare", "--net", "--mount", "ip", "link"], capture_output=True, check=False).returncode != 0,
        reason="no right to make namespaces, or no ip command",
    ),
]  # fmt: skip

RUN = "s3://runs/two"
SECTIONS = {
    "name": "two",
    "model": {"from_scratch": {"layers": 2, "width": 64, "heads": 4, "positions": 128, "vocab_size": 600}},
    "data": {
        "builder": "rlhf_ray.data.world:build",
        "builder_args": {"sft_rows": 300, "pairs": 120, "prompts": 64, "eval_prompts": 16, "eval_rows": 40},
        "max_prompt_tokens": 64,
    },
    "sft": {"max_steps": 6, "max_length": 128, "eval_rows": 16, "workers": 2, "microbatch_size": 16},
    "reward": {
        "max_steps": 4, "max_length": 128, "eval_rows": 16, "normalise_samples": 16, "workers": 2, "microbatch_size": 16,
    },
    "generation": {"max_new_tokens": 12, "chunk_size": 8},
    "ppo": {
        "steps": 3, "rollout_batch_size": 8, "minibatch_size": 8, "microbatch_size": 4, "ppo_epochs": 1, "checkpoint_every": 1,
        "eval_every": 2, "eval_prompts": 8, "accept_weak_reward": True,
    },
    "evaluation": {"prompts": 16, "bootstrap": 200, "samples": 3},
    "resources": {
        "policy": {"actors": 2, "cpus": 0.6, "zero_stage": 2}, "critic": {"cpus": 0.1}, "start_timeout_s": 900,
        **{role: {"cpus": 0.1} for role in ("generation", "reward", "reference")},
    },
}  # fmt: skip

SMALL = "--num-cpus 1 --object-store-memory 100000000"
#: what a host may write to is its own
DISK = f"""
    ip link set lo up
    mount -o remount,bind,ro /
    mount -t tmpfs own /tmp
    mount -t tmpfs own /dev/shm
    for elsewhere in /var/tmp {CLUSTER}; do
        if touch $elsewhere/shared 2>/dev/null; then echo "$elsewhere can be written to"; exit 1; fi
    done
    mkdir -p -m 700 /tmp/home/.ray
    (umask 077; echo "$TOKEN" > /tmp/home/.ray/auth_token)
"""


class Host:
    def __init__(self, environment):
        self.environment = environment
        self.holder = subprocess.Popen(["unshare", "--net", "--mount", "sleep", "infinity"])
        ours = os.readlink("/proc/self/ns/net")
        try:
            wait_for(lambda: os.readlink(f"/proc/{self.holder.pid}/ns/net") != ours)
            self.does(DISK)
        except BaseException:  # fault boundary: the host's start; nobody would end it
            self.holder.kill()
            raise

    def start(self, script):
        inside = ["nsenter", "--net", "--mount", "--target", str(self.holder.pid), "bash", "-ec", f"cd {CLUSTER.parent}\n{script}"]
        return subprocess.Popen(inside, env=self.environment, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip

    def does(self, script, timeout=300):
        """-> what it said. AssertionError with it where it failed."""
        process = self.start(script)
        try:
            said, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()
            said, _ = process.communicate(timeout=60)
            said += f"\n(ended after {timeout} s)"
            raise AssertionError(said[-6000:]) from None
        assert process.returncode == 0, said[-6000:]
        return said

    def end(self):
        self.start("cluster/stop.sh").communicate(timeout=200)
        self.holder.kill()
        self.holder.wait()


def test_a_run_of_two_hosts_without_a_shared_disk_is_whole_in_the_store():
    environment = bare_env(Path("/tmp/home")) | {
        "RAY_AUTH_MODE": "token", "TOKEN": os.urandom(16).hex(), "NO_PROXY": "10.9.8.7,127.0.0.1",
        "AWS_ENDPOINT_URL": "http://10.9.8.7:5000", "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "RECIPE": yaml.safe_dump(SECTIONS),
    }  # fmt: skip
    with ExitStack() as hosts:
        first, second = Host(environment), Host(environment)
        hosts.callback(first.end)
        hosts.callback(second.end)
        first.does(f"""
            ip link add eth7 type veth peer name eth3 netns {second.holder.pid}
            ip addr add 10.9.8.7/24 dev eth7
            ip link set eth7 up
        """)
        second.does("ip addr add 10.9.8.8/24 dev eth3; ip link set eth3 up")
        store = first.start("exec python -m moto.server -H 10.9.8.7 -p 5000 > /tmp/moto.log 2>&1")
        hosts.callback(store.kill)
        make = "import fsspec; fsspec.filesystem('s3').mkdir('runs')"
        first.does(f'for try in $(seq 60); do python -c "{make}" && exit; sleep 1; done; exit 1')
        first.does(f"bash cluster/head.sh {SMALL}")
        second.does(f"bash cluster/worker.sh 10.9.8.7 {SMALL}")
        first.does('cat > /tmp/two.yaml <<< "$RECIPE"')
        log = first.does(f"rlhf-ray submit /tmp/two.yaml --address http://127.0.0.1:8265 --run-dir {RUN}", 2400)
        status = second.does(f"python -m rlhf_ray status {RUN}")
        copy = second.does(f"rlhf-ray export {RUN}/ppo/checkpoints/step_000003 /tmp/exported; ls /tmp/exported")
        listing = "import fsspec; print(*fsspec.filesystem('s3').find('runs/two'))"
        stored = first.does(f'python -c "{listing}"').split()
        by_path = "find /tmp/home/.cache/rlhf_ray/runs -type f"
        files = [set(host.does(by_path).split()) for host in (first, second)]
    assert {f"runs/two/{each}" for each in (
        "sft/model/model.safetensors", "reward/model/model.safetensors", "ppo/model/model.safetensors", "report.html",
        "evaluation/summary.json", f"ppo/checkpoints/step_000003/{MANIFEST}",
    )} <= set(stored), log[-6000:]  # fmt: skip
    assert "model.safetensors" in copy and "evaluation" in status
    assert any(name.endswith("report.html") for name in files[0]), "the driver was on the first host"
    assert not any(name.endswith("report.html") for name in files[1]), "the second has a disk of its own"
    assert any(name.endswith(".safetensors") for name in files[1]), "and has fetched what its roles need"

"""What training a part of the weights costs: bytes of a weight sync, peak memory and CPU seconds of a policy step.

    python -m rlhf_ray.bench.update_passes 32        rollouts per microbatch

A GPT-2 of 14 million parameters under DeepSpeed on one rank, in float32 with one thread; each way in a process of its own. A
step is one of PPO's on 32 rollouts of 32 + 96 tokens.
"""

import json
import resource
import socket
import statistics
import subprocess
import sys
import time

WAYS = {
    "all weights": {},
    "all, checkpointed": {"gradient_checkpointing": True},
    "lora": {"lora": {"rank": 8}},
    "lora, checkpointed": {"lora": {"rank": 8}, "gradient_checkpointing": True},
    "4 of 6 blocks frozen": {"freeze_layers": 4},
}
ROWS, PROMPT, RESPONSE, STEPS = 32, 32, 96, 6


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(way: dict, microbatch: int) -> dict:
    import numpy as np
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from rlhf_ray.config import PPOConfig, Recipe
    from rlhf_ray.messages import OptimiserStep, PolicyShard, Sequences
    from rlhf_ray.models.load import disable_dropout
    from rlhf_ray.models.trained_part import train_only_part
    from rlhf_ray.models.wire import pack_weights
    from rlhf_ray.roles.configs import policy_loss_config
    from rlhf_ray.roles.policy_trainer import PolicyTrainer
    from rlhf_ray.training.deepspeed_engine import DeepSpeedEngine, OptimiserConfig
    from rlhf_ray.training.distributed import join_group
    from rlhf_ray.training.forward import LogprobModel

    torch.set_num_threads(1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    join_group(rank=0, world_size=1, address="127.0.0.1", port=port, device_type="cpu", timeout_s=60)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8192, n_positions=256, n_embd=384, n_layer=6, n_head=6))
    disable_dropout(model)
    ppo = PPOConfig(**way)
    train_only_part(
        model, lora=ppo.lora, freeze_layers=ppo.freeze_layers, gradient_checkpointing=ppo.gradient_checkpointing, seed=0
    )
    settings = OptimiserConfig(adam_eps=1e-5, max_grad_norm=1.0, zero_stage=0)
    before = peak_mb()
    engine = DeepSpeedEngine(
        LogprobModel(model, temperature=1.0, compute_dtype=torch.float32), settings, device=torch.device("cpu")
    )
    trainer = PolicyTrainer(engine, microbatch_size=microbatch, config=policy_loss_config(Recipe(name="bench")))
    draws = np.random.default_rng(0)
    prompts, responses = (
        [draws.integers(0, 8192, length).astype(np.int32) for _ in range(ROWS)] for length in (PROMPT, RESPONSE)
    )
    once = OptimiserStep(rows=np.arange(ROWS), num_tokens=ROWS * RESPONSE, num_sequences=ROWS)
    floats = draws.normal(size=ROWS * RESPONSE).astype(np.float32)
    shard = PolicyShard(
        step=0, sequences=Sequences.of(prompts, responses), old_logprobs=floats - 9.0, advantages=floats, schedule=(once,)
    )
    seconds = []
    for _ in range(STEPS):
        started = time.process_time()
        trainer.update(shard, 1e-5, 0.0)
        seconds.append(time.process_time() - started)
    (sent,) = pack_weights(trainer.weights(), 1, torch.float32)
    return {
        "parameters": sum(parameter.numel() for name, parameter in model.named_parameters() if "lora" not in name),
        "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "sync_bytes": sum(array.nbytes for array in sent.values()),
        "peak_mb_above_the_model": round(peak_mb() - before, 1),
        "step_cpu_s": round(statistics.median(seconds[1:]), 3),
    }


def main() -> None:
    microbatch, *one = sys.argv[1:]
    if one:
        print(json.dumps(measure(WAYS[one[0]], int(microbatch))))
        return
    for way in WAYS:
        done = subprocess.run([sys.executable, __file__, microbatch, way], capture_output=True, text=True, check=True)
        print(way, done.stdout.strip().splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()

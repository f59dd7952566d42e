#!/usr/bin/env bash
# PPO iterations on one GPU, phase by phase against its own rate of products, and TRL 1.11's PPOTrainer on it in the same sitting:
#     results/bench/gpu.sh OUT [PYTHON]
# OUT: folder for the JSON. PYTHON: an interpreter that has TRL 1.11 (without it, TRL's environment is made, from a package index).
set -euo pipefail
out=$1
against=(--against-trl)
[ -z "${2:-}" ] || against=(--trl-python "$2")
mkdir -p "$out"
python -m pytest -m gpu tests
rlhf-ray bench ppo --gpu --size 124m --batch 256 --prompt 64 --response 128 --microbatch 64 "${against[@]}" --json | tee "$out/124m.json"
rlhf-ray bench ppo --gpu --size 1b --batch 128 --prompt 128 --response 256 --microbatch 32 --iterations 3 "${against[@]}" --json \
    | tee "$out/1b.json"

#!/usr/bin/env bash
# All CPU benchmarks into this folder, one after the other, then the table and the plot: about half an hour on two idle cores.
#     results/bench/run.sh [PYTHON]
# PYTHON: an interpreter that has vLLM's CPU build (`make test-vllm` makes .venv-vllm/bin/python); without it generation is held
# against model.generate alone.
set -euo pipefail
out=results/bench
generate=(rlhf-ray)
[ -z "${1:-}" ] || generate=("$1" -m rlhf_ray.cli.main)

rlhf-ray bench ppo --iterations 8 --against-trl --json > $out/ppo_4m.json
rlhf-ray bench ppo --size 14m --iterations 6 --against-trl --json > $out/ppo_14m.json
rlhf-ray bench ppo --size 124m --batch 16 --microbatch 8 --iterations 2 --against-trl --json > $out/ppo_124m.json
"${generate[@]}" bench generate --json > $out/generate_4m.json
"${generate[@]}" bench generate --size 14m --json > $out/generate_14m.json
"${generate[@]}" bench generate --size 124m --repeats 2 --json > $out/generate_124m.json
rlhf-ray bench sync --megabytes 17 --megabytes 100 --megabytes 500 --json > $out/sync.json
rlhf-ray bench controller --generators 256 --steps 100 --json > $out/controller.json
rlhf-ray bench serve --json > $out/serve.json
OMP_WAIT_POLICY=active python $out/trials.py > $out/trials.txt
python $out/tables.py

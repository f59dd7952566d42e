#!/usr/bin/env bash
# All CPU benchmarks, one after the other, then the table and the plot: about an hour on two idle cores.
#     OUT=FOLDER results/bench/run.sh [PYTHON]
# OUT: where the results go; default: this folder.
# PYTHON: an interpreter that has vLLM's CPU build (`make test-vllm` makes .venv-vllm/bin/python); without it generation is compared
# with model.generate alone.
set -euo pipefail
out=${OUT:-results/bench}
mkdir -p "$out"
generate=(rlhf-ray)
[ -z "${1:-}" ] || generate=("$1" -m rlhf_ray.cli.main)

keep() { # NAME COMMAND...: its output as NAME.json, if it succeeds
    "${@:2}" > "$out/$1.partial"
    mv "$out/$1.partial" "$out/$1.json"
}

keep ppo_4m rlhf-ray bench ppo --iterations 8 --against-trl --json
keep ppo_14m rlhf-ray bench ppo --size 14m --iterations 6 --against-trl --json
keep ppo_124m rlhf-ray bench ppo --size 124m --batch 16 --microbatch 8 --iterations 2 --against-trl --json
keep generate_4m "${generate[@]}" bench generate --json
keep generate_14m "${generate[@]}" bench generate --size 14m --json
keep generate_124m "${generate[@]}" bench generate --size 124m --repeats 2 --json
keep sync rlhf-ray bench sync --megabytes 17 --megabytes 100 --megabytes 500 --json
keep controller rlhf-ray bench controller --generators 256 --steps 1000 --json
keep serve rlhf-ray bench serve --json
# Spinning, as a generation actor's threads do.
OMP_WAIT_POLICY=active python -m rlhf_ray.bench.trials --compile > "$out/trials.partial"
mv "$out/trials.partial" "$out/trials.txt"
python -m rlhf_ray.bench.tables "$out"

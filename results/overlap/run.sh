#!/usr/bin/env bash
# Does training on samples that are one step old cost quality? The demo with ppo.steps_ahead 0 and 1, three seeds, each pair
# on the same SFT and reward models:
#     results/overlap/run.sh runs/overlap [key=value ...]
# What follows the folder is --set for every run, for a short one for example
#     SEEDS=0 OUT=runs/overlap-short/compared results/overlap/run.sh runs/overlap-short \
#         sft.max_steps=20 fluency.max_steps=10 reward.max_steps=10 ppo.steps=4 evaluation.prompts=16
# Finished runs are skipped; a stopped one goes on. Environment variables: OUT (default results/overlap), SEEDS ("0 1 2") and
# ALGORITHMS: a folder of results/algorithms/run.sh; its PPO runs are then the synchronous ones.
set -euo pipefail
runs=$1
shift
out=${OUT:-results/overlap}
seeds=${SEEDS:-0 1 2}
common=()
for one in "$@"; do common+=(--set "$one"); done

run() { # label seed [option ...]
    local label=$1 seed=$2
    shift 2
    [ -e "$runs/$label-$seed/evaluation/DONE" ] ||
        rlhf-ray run demo --set "seed=$seed" --run-dir "$runs/$label-$seed" ${common[@]+"${common[@]}"} "$@"
}

synchronous=${ALGORITHMS:+$ALGORITHMS/ppo}
synchronous=${synchronous:-$runs/synchronous}
for seed in $seeds; do
    [ -n "${ALGORITHMS:-}" ] || run synchronous "$seed"
    run 1_ahead "$seed" --start-from "$synchronous-$seed" --set ppo.steps_ahead=1
done

python -m rlhf_ray.report.compare "$out" \
    $(for seed in $seeds; do echo "synchronous=$synchronous-$seed" "1_ahead=$runs/1_ahead-$seed"; done) \
    --curves objective/score,objective/kl,eval/score,policy/entropy,policy/approx_kl,policy/clip_frac,rollout/importance_mean,rollout/importance_capped_frac,rollout/off_policy_kl

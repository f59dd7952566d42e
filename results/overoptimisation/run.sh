#!/usr/bin/env bash
# The reward model's score and the true utility along the KL axis, in the demo world, for three prices of the KL:
#     results/overoptimisation/run.sh runs/overoptimisation
# One more run without a price stops by itself and goes back to the policy that the judge liked best.
set -euo pipefail
runs=$1
common=(--set ppo.steps=100 --set ppo.eval_every=5 --set ppo.eval_prompts=256 --set ppo.judge_evaluations=true)

for seed in 0 1; do
    [ -e "$runs/start-$seed/reward/DONE" ] || rlhf-ray reward demo --set seed=$seed --run-dir "$runs/start-$seed"
    for price in 0.2 0.05 0; do
        [ -e "$runs/kl$price-$seed/evaluation/DONE" ] || rlhf-ray run demo --set seed=$seed --start-from "$runs/start-$seed" \
            --run-dir "$runs/kl$price-$seed" --set ppo.kl_coef=$price "${common[@]}"
    done
    [ -e "$runs/stopped-$seed/evaluation/DONE" ] || rlhf-ray run demo --set seed=$seed --start-from "$runs/start-$seed" \
        --run-dir "$runs/stopped-$seed" --set ppo.kl_coef=0 "${common[@]}" \
        --set ppo.best_by=judge --set ppo.patience=3 --set ppo.roll_back=true
done

python -m rlhf_ray.evaluation.compare results/overoptimisation \
    $(for seed in 0 1; do for label in kl0.2 kl0.05 kl0 stopped; do echo "$label=$runs/$label-$seed"; done; done) \
    --curves eval/score,eval/judge --against eval/kl

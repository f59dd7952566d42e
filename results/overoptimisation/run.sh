#!/usr/bin/env bash
# The reward model's score and the true utility along the KL axis, in the demo world, for three KL coefficients:
#     results/overoptimisation/run.sh runs/overoptimisation [runs/algorithms]
# One more run with coefficient 0 stops by itself and goes back to the policy that the judge scored best. A seed's runs share their SFT
# and reward models: those of results/algorithms/run.sh where its folder is given, else of a run of the demo that is made first.
set -euo pipefail
runs=$1 finished=${2:-}
common=(--set ppo.steps=100 --set ppo.eval_every=5 --set ppo.eval_prompts=256 --set ppo.judge_evaluations=true)

for seed in 0 1; do
    start=${finished:+$finished/ppo-$seed}
    start=${start:-$runs/start-$seed}
    [ -e "$start/evaluation/DONE" ] || rlhf-ray run demo --set seed=$seed --run-dir "$start"
    for kl_coef in 0.2 0.05 0; do
        [ -e "$runs/kl$kl_coef-$seed/evaluation/DONE" ] || rlhf-ray run demo --set seed=$seed --start-from "$start" \
            --run-dir "$runs/kl$kl_coef-$seed" --set ppo.kl_coef=$kl_coef "${common[@]}"
    done
    [ -e "$runs/stopped-$seed/evaluation/DONE" ] || rlhf-ray run demo --set seed=$seed --start-from "$start" \
        --run-dir "$runs/stopped-$seed" --set ppo.kl_coef=0 "${common[@]}" \
        --set ppo.best_by=judge --set ppo.patience=3 --set ppo.roll_back=true
done

python -m rlhf_ray.report.compare results/overoptimisation \
    $(for label in kl0.2 kl0.05 kl0 stopped; do for seed in 0 1; do echo "$label=$runs/$label-$seed"; done; done) \
    --curves eval/score,eval/judge --against eval/kl --root

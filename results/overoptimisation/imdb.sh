#!/usr/bin/env bash
# The same on film reviews, where the judge is a model that learnt from people's ratings on other reviews than the reward model's:
#     results/overoptimisation/imdb.sh runs/imdb runs/overoptimisation_imdb [DATA]
# runs/imdb is a finished run of the recipe imdb (DATA: the data.root it had). Two seeds of PPO for each KL coefficient.
set -euo pipefail
imdb=$1 runs=$2
data=(${3:+--set data.root=$3})

for seed in 0 1; do
    for kl_coef in 0.12 0.04 0; do
        [ -e "$runs/kl$kl_coef-$seed/ppo/DONE" ] || rlhf-ray ppo imdb "${data[@]}" --start-from "$imdb" --run-dir "$runs/kl$kl_coef-$seed" \
            --set ppo.seed=$seed --set ppo.kl_coef=$kl_coef --set ppo.steps=80 --set ppo.anneal=false \
            --set ppo.judge_evaluations=true --set ppo.eval_every=10 --set ppo.eval_prompts=256
    done
done

python -m rlhf_ray.report.compare results/overoptimisation/imdb \
    $(for seed in 0 1; do for kl_coef in 0.12 0.04 0; do echo "kl$kl_coef=$runs/kl$kl_coef-$seed"; done; done) \
    --curves eval/score,eval/judge --against eval/kl --root

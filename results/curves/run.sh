#!/usr/bin/env bash
# OpenAI's 2019 sentiment setting (Ziegler et al., arXiv 1909.08593) on the models of the recipe imdb, five seeds of PPO:
#     results/curves/run.sh runs/imdb runs/curves [DATA]
# runs/imdb is a finished run of that recipe (DATA: the data.root it had). Scaled down: 25,000 episodes in place of a million,
# batch 128 in place of 512, and with them the controller's horizon (10,000 -> 250).
set -euo pipefail
imdb=$1 runs=$2
data=(${3:+--set data.root=$3})

for seed in 0 1 2 3 4; do
    [ -e "$runs/tensorflow-$seed/ppo/DONE" ] || rlhf-ray ppo imdb "${data[@]}" --start-from "$imdb" --run-dir "$runs/tensorflow-$seed" \
        --set ppo.seed=$seed --set ppo.steps=195 --set ppo.anneal=true --set ppo.adam_form=tensorflow --set ppo.adam_eps=1e-5 \
        --set ppo.rollout_batch_size=128 --set ppo.minibatch_size=128 --set ppo.microbatch_size=64 --set ppo.ppo_epochs=4 \
        --set ppo.learning_rate=1e-4 --set ppo.critic_learning_rate=1e-4 --set ppo.critic_init=sft \
        --set ppo.kl_coef=0.15 --set ppo.adaptive_kl.target=6 --set ppo.adaptive_kl.horizon=250 \
        --set ppo.whiten_rewards=true --set ppo.max_grad_norm=0 \
        --set generation.max_new_tokens=24 --set generation.min_new_tokens=24 --set generation.temperature=0.7 \
        --set generation.chunk_size=128 --set ppo.eval_every=65 --set ppo.checkpoint_every=25 \
        --set resources.reward.threads=1 --set resources.reference.threads=1 --set resources.policy.threads=1 \
        --set resources.critic.threads=1
done
python -m rlhf_ray.report.compare results/curves \
    $(for seed in 0 1 2 3 4; do echo "sentiment=$runs/tensorflow-$seed"; done)
python results/curves/table.py | tee results/curves/figures.txt
python results/curves/adam.py "$imdb" ${3:-}

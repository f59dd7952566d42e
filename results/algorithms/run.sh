#!/usr/bin/env bash
# Each algorithm in the demo world at equal samples (30 steps of 128), three seeds, on the same SFT and reward models:
#     results/algorithms/run.sh runs/algorithms
# Each seed's first run also trains DPO on the same pairs. Finished runs are skipped; a stopped one goes on.
set -euo pipefail
runs=$1
groups_of_4="--set ppo.samples_per_prompt=4 --set ppo.rollout_batch_size=32"

run() { # label seed [option ...]
    local label=$1 seed=$2
    shift 2
    [ -e "$runs/$label-$seed/evaluation/DONE" ] || rlhf-ray run demo --set "seed=$seed" --run-dir "$runs/$label-$seed" "$@"
}

for seed in 0 1 2; do
    run ppo $seed --set dpo.learning_rate=1e-4 --set dpo.beta=0.5
    from="--start-from $runs/ppo-$seed"
    run rloo $seed $from $groups_of_4 --set ppo.advantage=rloo --set ppo.loss_aggregation=sequence_sum
    run grpo $seed $from $groups_of_4 --set ppo.advantage=grpo --set ppo.loss_aggregation=sequence_mean \
        --set ppo.kl_in=loss --set ppo.kl_estimator=k3
    run dr_grpo $seed $from $groups_of_4 --set ppo.advantage=dr_grpo --set ppo.loss_aggregation=constant --set ppo.kl_coef=0
    run dapo $seed $from $groups_of_4 --set ppo.advantage=grpo --set ppo.kl_coef=0 --set ppo.clip_range_high=0.28 \
        --set ppo.overlong_buffer=8 --set ppo.dynamic_sampling_rounds=2
    run reinforce_pp $seed $from --set ppo.advantage=reinforce_pp
    run reinforce_pp_baseline $seed $from $groups_of_4 --set ppo.advantage=reinforce_pp_baseline \
        --set ppo.kl_in=loss --set ppo.kl_estimator=k2
done

python -m rlhf_ray.report.compare results/algorithms \
    $(for label in ppo rloo grpo dr_grpo dapo reinforce_pp reinforce_pp_baseline; do
        for seed in 0 1 2; do echo "$label=$runs/$label-$seed"; done
    done) --curves objective/score,objective/kl,eval/score,policy/entropy,policy/approx_kl,policy/clip_frac

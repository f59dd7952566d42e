#!/usr/bin/env bash
# GRPO on sums, three seeds:
#     results/arithmetic/run.sh runs/arithmetic
set -euo pipefail
runs=$1
for seed in 0 1 2; do
    [ -e "$runs/$seed/evaluation/DONE" ] || rlhf-ray run arithmetic --set seed=$seed --run-dir "$runs/$seed"
done
python -m rlhf_ray.report.compare results/arithmetic $(for seed in 0 1 2; do echo "grpo=$runs/$seed"; done) \
    --curves eval/score,objective/kl,policy/entropy,policy/approx_kl,objective/zero_variance_groups

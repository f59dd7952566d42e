#!/usr/bin/env bash
# The first hour on GPUs: what was written without one, in the order of its list, stopping at nothing; a table at the end.
#     results/gpu/first_hour.sh OUT
# For one node with 8 GPUs, in an environment with this package, its extras test and vllm, and torch's CUDA build. OUT: a folder for
# the logs (NN-name.log), memory.csv (nvidia-smi, every 2 s) and table.txt. SKIP="06 11" leaves checks out; ONLY="07" runs those alone.
set -uo pipefail  # not -e: a check that fails is a line of the table
out=${1:?usage: results/gpu/first_hour.sh OUT}
mkdir -p "$out"
cd "$(dirname "$0")/../.."
gpus=${GPUS:-$(nvidia-smi -L 2>/dev/null | wc -l)}
table=$out/table.txt
: > "$table"
: > "$out/memory.csv"

nvidia-smi --query-gpu=timestamp,index,memory.used,utilization.gpu --format=csv,noheader,nounits -l 2 > "$out/memory.csv" 2>/dev/null &
watcher=$!
trap 'kill "$watcher" 2>/dev/null' EXIT

# check NUMBER NAME SECONDS COMMAND...: its last line of output stands in the table.
check() {
    local number=$1 name=$2 limit=$3 log started code most
    shift 3
    case " ${SKIP:-} " in *" $number "*) return ;; esac
    if [ -n "${ONLY:-}" ]; then case " $ONLY " in *" $number "*) ;; *) return ;; esac; fi
    log=$out/$number-${name// /_}.log
    started=$(date +%s)
    local from
    from=$(wc -l < "$out/memory.csv")
    echo "== $number $name" >&2
    timeout --kill-after=30 "$limit" "$@" > "$log" 2>&1
    code=$?
    most=$(tail -n "+$((from + 1))" "$out/memory.csv" | awk -F', ' '$3 > most { most = $3 } END { printf "%.1f", most / 1024 }')
    printf '%s\t%s\t%s\t%ss\t%s GB\t%s\n' "$number" "$name" "$([ "$code" = 0 ] && echo ok || echo "FAILED ($code)")" \
        "$(($(date +%s) - started))" "$most" "$(tail -n 1 "$log" | cut -c 1-160)" >> "$table"
}

on_gpus() {  # on_gpus SHARE ROLE...: --set options that give each role's actors this share of a GPU
    local share=$1 role
    shift
    for role; do printf -- '--set\nresources.%s.gpus=%s\n' "$role" "$share"; done
}
stages=(--set ppo.accept_weak_reward=true --set evaluation.prompts=64)  # short: what they learn is not the question
for stage in sft reward fluency; do stages+=(--set "$stage.gpus_per_worker=1" --set "$stage.max_minutes=0.5"); done
mapfile -t shared < <(on_gpus 0.2 generation reward reference policy critic)
mapfile -t own < <(on_gpus 1 generation reward reference policy critic)

check 00 "environment"             60 bash -c 'nvidia-smi -L; python -c "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.device_count())"'
check 00 "tests marked gpu"       600 python -m pytest -q -p no:xdist -m "gpu and not vllm" tests
check 01 "vLLM engine"            600 python -m pytest -q -p no:xdist -m "gpu and vllm" tests/test_vllm.py
check 01 "vLLM shares a GPU"      600 rlhf-ray run demo --run-dir "$out/runs/vllm" "${stages[@]}" "${shared[@]}" --set generation.engine=vllm --set ppo.steps=5
check 02 "bf16 gates"             600 rlhf-ray run demo --run-dir "$out/runs/bf16" "${stages[@]}" "${own[@]}" --set ppo.precision=bfloat16 --set ppo.steps=5
check 03 "plan of memory"         120 rlhf-ray doctor demo "${stages[@]}" "${own[@]}"
check 03 "1 B against the plan"   900 rlhf-ray bench ppo --gpu --size 1b --batch 128 --prompt 128 --response 256 --microbatch 32 --iterations 3
check 04 "a GPU for each role"    600 rlhf-ray run demo --run-dir "$out/runs/own" "${stages[@]}" "${own[@]}" --set ppo.steps=5
check 04 "two ranks of policy"    600 rlhf-ray run demo --run-dir "$out/runs/ranks" "${stages[@]}" "${own[@]}" --set resources.policy.actors=2 --set ppo.steps=5
check 05 "a stage that measures"  600 rlhf-ray sft demo --run-dir "$out/runs/measure" --set sft.gpus_per_worker=1
check 06 "CUDA graphs"            600 python -m rlhf_ray.bench.first_hour decode
check 06 "graphs in a run"        600 rlhf-ray run demo --run-dir "$out/runs/graphs" "${stages[@]}" "${own[@]}" --set generation.engine=graphs --set ppo.steps=5
check 06 "vLLM serves"            600 python -m pytest -q -p no:xdist -m vllm tests/test_vllm_serving.py
check 07 "frozen in bf16"         300 python -m rlhf_ray.bench.first_hour frozen
check 07 "LoRA"                   600 rlhf-ray run demo --run-dir "$out/runs/lora" "${stages[@]}" "${own[@]}" --set ppo.lora.rank=16 --set reward.lora.rank=16 --set ppo.steps=5
check 08 "ZeRO-3"                 600 rlhf-ray run demo --run-dir "$out/runs/zero3" "${stages[@]}" "${own[@]}" --set resources.policy.actors=2 --set resources.policy.zero_stage=3 --set ppo.steps=5
check 08 "ZeRO-3, SFT"            600 rlhf-ray sft demo --run-dir "$out/runs/sft3" --set sft.gpus_per_worker=1 --set sft.workers="$((gpus < 2 ? 1 : 2))" --set sft.zero_stage=3 --set sft.microbatch_size=16
check 09 "weights to the host"    300 python -m rlhf_ray.bench.first_hour wire
check 09 "a step ahead"           600 rlhf-ray run demo --run-dir "$out/runs/ahead" "${stages[@]}" "${own[@]}" --set ppo.steps_ahead=1 --set ppo.steps=10
check 09 "weights in flight"      600 rlhf-ray run demo --run-dir "$out/runs/flight" "${stages[@]}" "${own[@]}" --set ppo.steps_ahead=2 --set ppo.weights_in_flight=true --set ppo.steps=10
check 09 "ahead, by the store"    600 rlhf-ray run demo --run-dir "$out/runs/store" "${stages[@]}" "${own[@]}" --set ppo.steps_ahead=1 --set ppo.steps=10 --set resources.weight_transport=object_store
check 10 "all on one GPU"         600 rlhf-ray run demo --run-dir "$out/runs/shared" "${stages[@]}" "${shared[@]}" --set ppo.steps=5
check 10 "nobody rests there"     600 rlhf-ray run demo --run-dir "$out/runs/awake" "${stages[@]}" "${shared[@]}" --set ppo.steps=5 --set ppo.steps_ahead=1
check 11 "evaluation"             600 rlhf-ray evaluate demo --run-dir "$out/runs/own"
check 12 "entropy bonus"          300 python -m rlhf_ray.bench.first_hour head
check 13 "long prompts"           300 python -m rlhf_ray.bench.first_hour prefill
check 14 "approx_kl to itself"    300 python -m rlhf_ray.bench.first_hour first_kl
check 14 "NCCL variables"         600 env NCCL_DEBUG=INFO rlhf-ray run demo --run-dir "$out/runs/nccl" "${stages[@]}" "${own[@]}" --set resources.policy.actors=2 --set ppo.steps=2
# Rows 09: weights go by NCCL from a pinned copy on the host, beside the next update; through the store for comparison (time/sync_s
# and busy/policy_sync_s in metrics.jsonl). Rows 10: in the first one Adam's moments leave the GPU between updates, as the lower
# memory has to show; the plan of both is `rlhf-ray doctor`'s.

{ printf 'item\tcheck\tresult\ttook\tmost memory of a GPU\tlast line\n'; cat "$table"; } | column -t -s $'\t' | tee "$out/table.aligned.txt"

#!/usr/bin/env bash
# The first hour on GPUs: what was written without one, in the order of its list, stopping at nothing; a table at the end.
#     results/gpu/first_hour.sh OUT
# For one node with 8 GPUs, in an environment with this package, its extras test and vllm, and torch's CUDA build. OUT: a folder for
# the logs (NN-name.log), memory.csv (nvidia-smi, every 2 s) and table.txt. SKIP="06 11" leaves checks out; ONLY="07" runs those alone
# (and 00, whose models most others begin with). Without a GPU each row says so, and nothing is started.
set -uo pipefail  # not -e: a check that fails is a line of the table
out=${1:?usage: results/gpu/first_hour.sh OUT}
mkdir -p "$out"
cd "$(dirname "$0")/../.."
gpus=${GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ')}
table=$out/table.txt
: > "$table"
: > "$out/memory.csv"

if [ "$gpus" -gt 0 ]; then
    nvidia-smi --query-gpu=timestamp,index,memory.used,utilization.gpu --format=csv,noheader,nounits -l 2 > "$out/memory.csv" 2>/dev/null &
    watcher=$!
    trap 'kill "$watcher" 2>/dev/null' EXIT
fi

# check NUMBER NAME GPUS SECONDS COMMAND...: its last line of output stands in the table.
check() {
    local number=$1 name=$2 needed=$3 limit=$4 log started code most from
    shift 4
    case " ${SKIP:-} " in *" $number "*) return ;; esac
    if [ -n "${ONLY:-}" ]; then case " 00 $ONLY " in *" $number "*) ;; *) return ;; esac; fi
    if [ "$gpus" -lt "$needed" ]; then
        printf '%s\t%s\t%s\t-\t-\tit needs %s, and there are %s\n' "$number" "$name" \
            "$([ "$gpus" = 0 ] && echo "no GPU" || echo "too few GPUs")" "$needed" "$gpus" >> "$table"
        return
    fi
    log=$out/$number-${name// /_}.log
    started=$(date +%s)
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
mapfile -t colocated < <(printf -- '--set\nresources.%s.with=policy\n' generation reward reference critic)
two=(--set resources.policy.actors=2)
begun=("${stages[@]}" --start-from "$out/runs/begun")  # with the models of row 00

check 00 "environment"           1   60 bash -c 'nvidia-smi -L; python -c "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.device_count())"'
check 00 "tests marked gpu"      1  600 python -m pytest -q -p no:xdist -m "gpu and not vllm" tests
check 00 "models to begin with"  1  600 rlhf-ray reward demo --run-dir "$out/runs/begun" "${stages[@]}"
check 01 "vLLM engine"           1  600 python -m pytest -q -p no:xdist -m "gpu and vllm" tests/test_vllm.py
check 01 "vLLM shares a GPU"     1  600 rlhf-ray run demo --run-dir "$out/runs/vllm" "${begun[@]}" "${shared[@]}" --set generation.engine=vllm --set ppo.steps=5
check 01 "vLLM on two GPUs"      6  600 rlhf-ray run demo --run-dir "$out/runs/split" "${begun[@]}" "${own[@]}" --set generation.engine=vllm --set generation.tensor_parallel=2 --set resources.generation.gpus=2 --set ppo.steps=5
check 02 "bf16 gates"            5  600 rlhf-ray run demo --run-dir "$out/runs/bf16" "${begun[@]}" "${own[@]}" --set ppo.precision=bfloat16 --set ppo.steps=5
check 02 "float32 logits"        5  600 rlhf-ray run demo --run-dir "$out/runs/head" "${begun[@]}" "${own[@]}" --set ppo.precision=bfloat16 --set ppo.float32_head=true --set ppo.steps=5
check 03 "plan of memory"        1  120 rlhf-ray doctor demo "${stages[@]}" "${own[@]}"
check 03 "1 B against the plan"  1  900 rlhf-ray bench ppo --gpu --size 1b --batch 128 --prompt 128 --response 256 --microbatch 32 --iterations 3
check 04 "a GPU for each role"   5  600 rlhf-ray run demo --run-dir "$out/runs/own" "${begun[@]}" "${own[@]}" --set ppo.steps=5
check 04 "two ranks of policy"   6  600 rlhf-ray run demo --run-dir "$out/runs/ranks" "${begun[@]}" "${own[@]}" "${two[@]}" --set ppo.steps=5
check 04 "all roles on two GPUs" 2  600 rlhf-ray run demo --run-dir "$out/runs/both" "${begun[@]}" "${shared[@]}" "${colocated[@]}" "${two[@]}" --set resources.generation.actors=2 --set ppo.steps=5
check 05 "a stage that measures" 1  600 rlhf-ray sft demo --run-dir "$out/runs/measure" "${stages[@]}"
check 06 "CUDA graphs"           1  600 python -m rlhf_ray.bench.first_hour decode
check 06 "graphs in a run"       5  600 rlhf-ray run demo --run-dir "$out/runs/graphs" "${begun[@]}" "${own[@]}" --set generation.engine=graphs --set ppo.steps=5
check 06 "vLLM serves"           1  600 python -m pytest -q -p no:xdist -m vllm tests/test_vllm_serving.py
check 07 "frozen in bf16"        1  300 python -m rlhf_ray.bench.first_hour frozen
check 07 "LoRA"                  5  600 rlhf-ray run demo --run-dir "$out/runs/lora" "${stages[@]}" "${own[@]}" --set ppo.lora.rank=16 --set reward.lora.rank=16 --set ppo.steps=5
check 08 "ZeRO-3"                6  600 rlhf-ray run demo --run-dir "$out/runs/zero3" "${begun[@]}" "${own[@]}" "${two[@]}" --set resources.policy.zero_stage=3 --set ppo.steps=5
check 08 "ZeRO-3, offloaded"     6  600 rlhf-ray run demo --run-dir "$out/runs/offload" "${begun[@]}" "${own[@]}" "${two[@]}" --set resources.policy.zero_stage=3 --set resources.policy.offload_optimizer=true --set resources.policy.offload_param=true --set ppo.steps=5
check 08 "ZeRO-3, SFT"           2  600 rlhf-ray sft demo --run-dir "$out/runs/sft3" "${stages[@]}" --set sft.workers=2 --set sft.zero_stage=3 --set sft.microbatch_size=16
check 09 "weights to the host"   1  300 python -m rlhf_ray.bench.first_hour wire
check 09 "a step ahead"          5  600 rlhf-ray run demo --run-dir "$out/runs/ahead" "${begun[@]}" "${own[@]}" --set ppo.steps_ahead=1 --set ppo.steps=10
check 09 "weights in flight"     5  600 rlhf-ray run demo --run-dir "$out/runs/flight" "${begun[@]}" "${own[@]}" --set ppo.steps_ahead=2 --set ppo.weights_in_flight=true --set ppo.steps=10
check 09 "ahead, by the store"   5  600 rlhf-ray run demo --run-dir "$out/runs/store" "${begun[@]}" "${own[@]}" --set ppo.steps_ahead=1 --set ppo.steps=10 --set resources.weight_transport=object_store
check 10 "all on one GPU"        1  600 rlhf-ray run demo --run-dir "$out/runs/shared" "${begun[@]}" "${shared[@]}" --set ppo.steps=5
check 10 "nobody rests there"    1  600 rlhf-ray run demo --run-dir "$out/runs/awake" "${begun[@]}" "${shared[@]}" --set ppo.steps=5 --set ppo.steps_ahead=1
check 11 "evaluation, vLLM"      1  900 rlhf-ray evaluate demo --run-dir "$out/runs/rated" "${begun[@]}" "${shared[@]}" --set generation.engine=vllm --set ppo.steps=2
check 12 "entropy bonus"         1  300 python -m rlhf_ray.bench.first_hour head
check 13 "long prompts"          1  300 python -m rlhf_ray.bench.first_hour prefill
check 14 "approx_kl to itself"   1  300 python -m rlhf_ray.bench.first_hour first_kl
check 14 "NCCL variables"        6  600 env NCCL_DEBUG=INFO rlhf-ray run demo --run-dir "$out/runs/nccl" "${begun[@]}" "${own[@]}" "${two[@]}" --set ppo.steps=2
# Rows 09: weights go by NCCL from a pinned copy on the host, beside the next update; through the store for comparison (time/sync_s
# and busy/policy_sync_s in metrics.jsonl). Rows 10: in the first one Adam's moments leave the GPU between updates, as the lower
# memory has to show; the plan of both is `rlhf-ray doctor`'s.

{ printf 'item\tcheck\tresult\ttook\tmost memory of a GPU\tlast line\n'; cat "$table"; } | column -t -s $'\t' | tee "$out/table.aligned.txt"

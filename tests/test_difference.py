"""The adapter between two models."""

import pytest
import torch
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf_ray.errors import UserError
from rlhf_ray.models.difference import adapter_between, save_difference

FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=24, n_head=2, n_positions=32, vocab_size=50)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        tie_word_embeddings=True,
    )),
}  # fmt: skip


def pair(family, rank):
    """A model, and one whose linear layers have a change of this rank."""
    torch.manual_seed(0)
    start, tuned = FAMILIES[family](), FAMILIES[family]()
    tuned.load_state_dict(start.state_dict())
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if any(part in name for part in ("c_attn.weight", "c_fc.weight", "q_proj", "down_proj")):
                parameter += 0.1 * torch.randn(parameter.shape[0], rank) @ torch.randn(rank, parameter.shape[1])
    return start.eval(), tuned.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_back_what_two_adapters_together_changed(family, tmp_path):
    start, tuned = pair(family, 5)
    ids = torch.randint(0, 50, (3, 12))
    with torch.no_grad():
        before, wanted = start(ids).logits.clone(), tuned(ids).logits
        assert save_difference(start, tuned, 5, tmp_path / "adapter", "somebody/model") < 1e-6
        found = PeftModel.from_pretrained(start, tmp_path / "adapter")(ids).logits
    assert float((found - wanted).norm()) < 0.01 * float((before - wanted).norm()), "bfloat16 has 8 bits"
    sizes = {
        tensor.dtype
        for tensor in PeftModel.from_pretrained(FAMILIES[family](), tmp_path / "adapter").state_dict().values()
    }
    assert sizes == {torch.float32}


def test_a_lower_rank_leaves_out_the_smallest_singular_values():
    """One layer whose change has the singular values 4 and 3: of rank 1 it is off by 3 of 5."""
    start, tuned = pair("llama", 1)
    tuned.load_state_dict(start.state_dict())
    with torch.no_grad():
        weight = tuned.model.layers[0].self_attn.o_proj.weight
        weight[0, 0] += 4
        weight[1, 1] += 3
    assert adapter_between(start, tuned, 1).lost == pytest.approx(0.6, abs=1e-5)
    assert adapter_between(start, tuned, 2).lost == pytest.approx(0, abs=1e-5)


def test_a_rank_above_a_layers_own_is_padded(tmp_path):
    start, tuned = pair("llama", 3)
    assert save_difference(start, tuned, 40, tmp_path / "adapter", "m") < 1e-6
    PeftModel.from_pretrained(FAMILIES["llama"](), tmp_path / "adapter")
    with pytest.raises(UserError, match="rank 0 changes nothing"):
        adapter_between(start, tuned, 0)


def test_a_row_that_was_added_for_padding_is_left_out(tmp_path):
    start, tuned = pair("llama", 2)
    tuned.resize_token_embeddings(51)
    assert save_difference(start, tuned, 2, tmp_path / "adapter", "m") < 1e-6
    ids = torch.randint(0, 50, (3, 12))
    with torch.no_grad():
        wanted, found = tuned(ids).logits[..., :50], PeftModel.from_pretrained(start, tmp_path / "adapter")(ids).logits
    assert float((found - wanted).norm()) < 0.01 * float(wanted.norm())


def test_a_change_elsewhere_is_refused():
    start, tuned = pair("llama", 1)
    with torch.no_grad():
        tuned.model.norm.weight += 1
    with pytest.raises(UserError, match=r"model\.norm\.weight differs, which an adapter can't change"):
        adapter_between(start, tuned, 2)
    with pytest.raises(UserError, match="have other layers"):
        adapter_between(start, FAMILIES["gpt2"](), 2)

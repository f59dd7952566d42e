"""The C functions of a decode step against float64 written out, and the engine with them against the engine without."""

import numpy as np
import pytest
import torch
from crossed import crossed
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from rlhf_ray.algorithms.sampling import draw
from rlhf_ray.cpu.compiled import library
from rlhf_ray.cpu.operations import OperationsInC, attend
from rlhf_ray.generation.decode_step import Operations
from rlhf_ray.generation.kv_cache import RaggedCache
from rlhf_ray.generation.ragged_decoder import RaggedDecoder

pytest_plugins = ["processors"]
pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")
IN_C = OperationsInC(Operations())
FAMILIES = {
    "gpt2": (GPT2Config, GPT2LMHeadModel, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 2, "intermediate_size": 96}),
}


def filled_cache(lengths, groups, channels, slots, *, centred, dtype=torch.bfloat16):
    """A layer whose rows hold these numbers of tokens; one row more than there are, and NaN wherever nothing was written."""
    cache = RaggedCache(1, centred=centred)
    cache.write.rows, cache.write.slots = len(lengths) + 1, slots
    layer = cache.layers[0]
    layer.lazy_initialization(*[torch.zeros(1, groups, 1, channels, dtype=dtype)] * 2)
    for states in (layer.keys, layer.values, layer.centres):
        states.copy_(torch.randn(states.shape))
    for row, length in enumerate(lengths):
        layer.keys[row, :, length:] = layer.values[row, :, length:] = torch.nan
    return cache, layer


@crossed(
    "dtype, centred, groups, lines, channels", [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False)],
    [(4, 1, 64), (2, 3, 128), (1, 2, 8), (3, 1, 34)],
)  # fmt: skip
def test_attention_over_each_rows_own_slots(groups, lines, channels, centred, dtype):
    """The new key and value are stored, and every slot up to theirs is attended to, none beyond."""
    torch.manual_seed(0)
    lengths = [0, 1, 7, 8, 15, 16, 29, 47]
    n, heads = len(lengths), groups * lines
    cache, layer = filled_cache(lengths, groups, channels, 48, centred=centred, dtype=dtype)
    old_keys, old_values, centres = layer.keys.double(), layer.values.double(), layer.centres.double()
    tokens = torch.randn(n, (heads + 2 * groups) * channels).to(dtype) * 2
    query, key, value = tokens.split([heads * channels, groups * channels, groups * channels], 1)
    query, key, value = (states.unflatten(1, (-1, channels)) for states in (query, key, value))
    cache.begin_decode(torch.tensor(lengths), 48)
    assert IN_C.attention(cache, dtype, groups, channels) is attend
    mixed, digit = attend(layer, query, key, value, 0.3), 2**-8 if dtype == torch.bfloat16 else 2**-20
    for row, length in enumerate(lengths):
        new = key[row].double() - (centres[row, :, 0] if centred else 0)
        torch.testing.assert_close(layer.keys[row, :, length].double(), new, rtol=digit, atol=1e-9)
        assert torch.equal(layer.values[row, :, length], value[row])
        for head in range(heads):
            group = head // lines
            keys = torch.cat((old_keys[row, group, :length], layer.keys[row, group, length].double()[None]))
            values = torch.cat((old_values[row, group, :length], value[row, group].double()[None]))
            expected = (0.3 * keys @ query[row, head].double()).softmax(0) @ values
            found = mixed[row, head * channels : (head + 1) * channels].double()
            torch.testing.assert_close(found, expected, rtol=digit, atol=1e-5)
        assert torch.equal(layer.keys[row, :, :length].double(), old_keys[row, :, :length])
        assert layer.keys[row, :, length + 1 :].isnan().all() and layer.values[row, :, length + 1 :].isnan().all()


def test_a_rows_attention_is_its_own():
    """To the bit: alone or with others, in a small cache or a large one, with one thread or two."""
    torch.manual_seed(1)
    lengths, found, threads = [20, 3, 31], [], torch.get_num_threads()
    query, key, value = (torch.randn(3, 2, 64).bfloat16() for _ in range(3))
    cache, layer = filled_cache(lengths, 2, 64, 32, centred=True)
    cache.begin_decode(torch.tensor(lengths), 32)
    try:
        for rows, slots, count in ((3, 32, 1), (3, 32, 2), (3, 96, 2), (1, 32, 1)):
            torch.set_num_threads(count)
            cache.write.slots = slots
            layer.resize()
            cache.begin_decode(torch.tensor(lengths[:rows]), slots)
            found.append(attend(layer, query[:rows], key[:rows], value[:rows], 0.1))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(each[0], found[0][0]) for each in found)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("width", [256, 37])
def test_norms_after_a_sum(rms, width, processor):
    torch.manual_seed(0)
    norm = torch.nn.RMSNorm(width, eps=1e-3) if rms else torch.nn.LayerNorm(width, eps=1e-3)
    norm.variance_epsilon = 1e-3
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, 1.0)
    hidden, change = (torch.randn(5, width) * 0.05 + 0.02 for _ in range(2))
    total = hidden + change
    with torch.no_grad():
        found = IN_C.add_and_normalise(hidden, change, norm)
        again = IN_C.add_and_normalise(hidden, None, norm)
    assert torch.equal(hidden, total) and torch.equal(again, found)
    x = total.double() if rms else total.double() - total.double().mean(1, keepdim=True)
    expected = x / (x.square().mean(1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    expected = expected if rms else expected + norm.bias.double()
    torch.testing.assert_close(found.double(), expected, rtol=2**-18, atol=1e-6)


def test_numbers_that_they_do_not_take_are_left_to_torch():
    """Other dtypes, what does not lie number after number, layers that do more; and a bfloat16 head of odd size."""
    asked = []

    class Others(Operations):
        def __getattribute__(self, name):
            asked.append(name)
            return super().__getattribute__(name)

    mixed, cache = OperationsInC(Others()), RaggedCache(1)
    cache.begin_decode(torch.tensor([0, 0]), 16)
    tokens, words, norm = torch.tensor([1, 2]), torch.nn.Embedding(5, 4), torch.nn.LayerNorm(4)
    hidden, angles = torch.randn(2, 4), torch.rand(8, 4)
    with torch.no_grad():
        mixed.embed(tokens, tokens, words.double())
        mixed.embed(tokens, tokens, torch.nn.Embedding(5, 4, max_norm=1.0))
        mixed.add_and_normalise(torch.randn(4, 2).t(), None, norm)
        mixed.add_and_normalise(hidden.double(), None, norm.double())
        mixed.turn(torch.randn(2, 1, 4).double(), angles, angles, tokens)
        mixed.attention(cache, torch.bfloat16, 1, 3)
        mixed.attention(with_centres(cache), torch.float32, 1, 4)
    assert asked == ["embed"] * 2 + ["add_and_normalise"] * 2 + ["turn"] + ["attention"] * 2


def with_centres(cache):
    """With centres, which float32 keys have no use for."""
    other = RaggedCache(1, centred=True)
    other.write = cache.write
    return other


def test_embeddings_and_rotary_positions(processor):
    torch.manual_seed(0)
    words, places = torch.nn.Embedding(9, 37), torch.nn.Embedding(5, 37)
    tokens, positions = torch.tensor([8, 0, 3]), torch.tensor([4, 0, 1])
    with torch.no_grad():
        assert torch.equal(IN_C.embed(tokens, positions, words), words.weight[tokens])
        assert torch.equal(IN_C.embed(tokens, positions, words, places), words.weight[tokens] + places.weight[positions])
    states, angles = torch.randn(3, 2, 34), torch.rand(5, 17).repeat(1, 2)
    turned = torch.view_as_complex(torch.stack(states.double().split(17, -1), -1).contiguous())
    turned = turned * torch.polar(torch.ones(5, 17, dtype=torch.float64), angles.double()[:, :17])[positions][:, None]
    expected = torch.cat((turned.real, turned.imag), -1)
    found = IN_C.turn(states, angles.cos(), angles.sin(), positions)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "apart"), [(torch.bfloat16, 0.05), (torch.float32, 2e-5)])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_the_step_with_them_is_the_step_without(family, monkeypatch, dtype, apart):
    config, kind, sizes = FAMILIES[family]
    prompts = [np.arange(1, 1 + length) for length in (1, 2, 9, 30)]
    ends, found = np.array([len(ids) for ids in prompts]), []
    for switch in ("on", "off"):
        monkeypatch.setenv("RLHF_RAY_CPU", switch)
        torch.manual_seed(0)
        with torch.inference_mode(False):  # a weight that was made in it is never packed
            model = kind(config(vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                initializer_range=0.1, max_position_embeddings=64, **sizes))  # fmt: skip
        decoder = RaggedDecoder(model.to(dtype))
        cache = decoder.new_cache()
        cache.reserve(len(prompts), 32)
        decoder.prefill(cache, 0, prompts)
        decoder.decode(cache, np.array([ids[-1] for ids in prompts]), ends - 1)
        logits = decoder.decode(cache, np.array([5, 6, 7, 8]), ends)
        found.append((logits.float().log_softmax(-1), draw(logits, torch.full((4,), 0.37), temperature=0.9)[1]))
    for with_them, without in zip(*found, strict=True):
        torch.testing.assert_close(with_them, without, atol=apart, rtol=apart / 5)

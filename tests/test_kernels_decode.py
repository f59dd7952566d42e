"""The C functions of a decode step against float64 written out, and the engine with them against the engine without."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from rlhf_ray.algorithms.sampling import draw
from rlhf_ray.cpu import kernels
from rlhf_ray.cpu.packed_linear import (
    GELU,
    NOTHING,
    SILU,
    TIMES,
    PackedForward,
)
from rlhf_ray.generation.decode_step import _add_and_normalise
from rlhf_ray.generation.kv_cache import RaggedCache, RaggedLayer
from rlhf_ray.generation.ragged_decoder import RaggedDecoder

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no C compiler, or RLHF_RAY_KERNELS=off")
FAMILIES = {
    "gpt2": (GPT2Config, GPT2LMHeadModel, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 2, "intermediate_size": 96}),
}


@pytest.fixture
def off(monkeypatch):
    """A function after which torch does the work."""

    def switch():
        monkeypatch.setenv("RLHF_RAY_KERNELS", "off")
        kernels.library.cache_clear()
        kernels.has_blocks.cache_clear()

    yield switch
    monkeypatch.undo()
    kernels.library.cache_clear()
    kernels.has_blocks.cache_clear()


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


@pytest.mark.parametrize(
    ("dtype", "centred"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False)]
)
@pytest.mark.parametrize(
    ("groups", "lines", "channels"), [(4, 1, 64), (2, 3, 128), (1, 2, 8), (3, 1, 34)], ids=lambda size: str(size)
)
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
    attend = cache.decode_attention(dtype, groups, channels)
    assert attend == RaggedLayer.attend
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
            attend = cache.decode_attention(torch.bfloat16, 2, 64)
            found.append(attend(layer, query[:rows], key[:rows], value[:rows], 0.1))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(each[0], found[0][0]) for each in found)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def expected_draw(logits, uniform, temperature):
    """The first token whose cumulative probability exceeds the draw, and all tokens' log-probs."""
    logprobs = (logits.double() / temperature).log_softmax(-1)
    cumulative = logprobs.exp().cumsum(0)
    return int((cumulative <= uniform * cumulative[-1]).sum()), logprobs, cumulative / cumulative[-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab_size", [1, 5, 128, 300, 4096])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_draws_from_the_whole_vocabulary(dtype, vocab_size, temperature):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(40, vocab_size, generator=generator) * 3).to(dtype)
    uniforms = torch.rand(40, generator=generator)
    uniforms[:4] = torch.tensor([0.0, 1e-38, 1 - 2**-24, 0.5])
    tokens, logprobs = draw(logits, uniforms, temperature=temperature)
    exact = 0
    for row in range(40):
        token, expected, cumulative = expected_draw(logits[row], float(uniforms[row]), temperature)
        found = int(tokens[row])
        exact += token == found
        # A draw at the border of two tokens' shares may fall to either.
        below = cumulative[found - 1] if found else 0.0
        assert below - 1e-6 <= uniforms[row] <= cumulative[found] + 1e-6
        assert float(logprobs[row]) == pytest.approx(float(expected[found]), abs=2e-6, rel=1e-6)
    assert exact >= 39


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_token_without_probability_is_never_drawn(dtype):
    """Nor any beyond the last one that has some, however near to 1 the draw."""
    logits = torch.full((6, 500), -torch.inf)
    logits[:, 130:140] = torch.linspace(0, 1, 10)
    logits[:, 260] = -200.0  # 0 in float32
    logits[3:, 450] = 0.5
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-24] * 2)
    tokens, logprobs = draw(logits.to(dtype), uniforms, temperature=1.0)
    assert tokens.tolist()[:1] == [130] and tokens.tolist()[2:4] == [139, 130] and int(tokens[5]) == 450
    assert logprobs.isfinite().all()
    logits = torch.randn(500, 128).to(dtype)  # sums of which round up as often as down
    logits[:, 100:] = -torch.inf
    tokens, _ = draw(logits, uniforms[2].expand(500).contiguous(), temperature=1.0)
    assert tokens.max() == 99


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.5, 0.0, 0.25, 0.25]).log().expand(1000, 4).contiguous()
    tokens, _ = draw(logits, (torch.arange(1000) + 0.5) / 1000, temperature=1.0)
    assert tokens.bincount(minlength=4).tolist() == [500, 0, 250, 250]
    tokens, _ = draw(torch.zeros(3, 4), torch.tensor([0.25, 0.5, 0.75]), temperature=1.0)
    assert tokens.tolist() == [1, 2, 3], "a draw that a cumulative probability equals belongs to the next token"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_not_a_number_shows_in_the_log_prob(bad, dtype):
    logits = torch.randn(3, 300).to(dtype)
    logits[1, 200] = bad
    if bad == -torch.inf:
        logits[1] = bad
    tokens, logprobs = draw(logits, torch.full((3,), 0.4), temperature=1.0)
    assert logprobs.isfinite().tolist() == [True, False, True]
    assert ((tokens >= 0) & (tokens < 300)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("width", [256, 37])
def test_norms_after_a_sum(rms, width, dtype):
    torch.manual_seed(0)
    norm = torch.nn.RMSNorm(width, eps=1e-3) if rms else torch.nn.LayerNorm(width, eps=1e-3)
    norm.variance_epsilon = 1e-3
    for parameter in norm.to(dtype).parameters():
        torch.nn.init.normal_(parameter, 1.0)
    hidden, change = (torch.randn(5, width).to(dtype) * 0.05 + 0.02 for _ in range(2))
    total = hidden + change
    with torch.no_grad():
        found = _add_and_normalise(hidden, change, norm)
        again = _add_and_normalise(hidden, None, norm)
    assert torch.equal(hidden, total) and torch.equal(again, found)
    x = total.double() if rms else total.double() - total.double().mean(1, keepdim=True)
    expected = x / (x.square().mean(1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    expected = expected if rms else expected + norm.bias.double()
    torch.testing.assert_close(found.double(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 2**-18, atol=1e-6)


@pytest.mark.usefixtures("processor_with_blocks")
@pytest.mark.parametrize("after", [NOTHING, GELU, SILU, TIMES])
@pytest.mark.parametrize(("width", "outputs", "bias"), [(64, 96, True), (32, 50, False), (1056, 17, True)])
@torch.no_grad()
def test_products_of_few_rows(after, width, outputs, bias):
    """The kernel's own result, for any number of rows, and to the bit the same whatever the others are."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(width, outputs, bias=bias).bfloat16()
    if bias:
        torch.nn.init.normal_(layer.bias)
    forward, many = PackedForward(layer, frozen=False), torch.randn(257, width).bfloat16() * 3
    others = torch.randn(257, outputs).bfloat16() if after == TIMES else None
    found = forward.run(many[:100], after, None if others is None else others[:100])
    assert forward.tiled
    u = many.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    expected = {
        NOTHING: lambda: u,
        GELU: lambda: 0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3))),
        SILU: lambda: u / (1 + torch.exp(-u)),
        TIMES: lambda: u * others.double(),
    }[after]()
    torch.testing.assert_close(found.double(), expected[:100], rtol=2**-8, atol=1e-3)
    for rows in (slice(0, 1), slice(3, 34), slice(36, 100)):
        some = forward.run(many[rows], after, None if others is None else others[rows])
        assert torch.equal(some, found[rows])
    torch.testing.assert_close(forward.run(many, after, others).double(), expected, rtol=2**-7, atol=1e-2)


@pytest.mark.usefixtures("processor_with_blocks")
@torch.no_grad()
def test_tiles_follow_the_weight():
    layer, x = torch.nn.Linear(64, 40, bias=False).bfloat16(), torch.eye(64).bfloat16()
    layer.forward = PackedForward(layer, frozen=False)
    assert torch.equal(layer(x), layer.weight.T)
    where = layer.forward._packed.data_ptr()
    layer.weight.mul_(2.0)
    assert torch.equal(layer(x), layer.weight.T)
    assert layer.forward._packed.data_ptr() == where  # memory that is new comes page by page


@pytest.mark.parametrize(("dtype", "apart"), [(torch.bfloat16, 0.05), (torch.float32, 2e-5)])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_the_step_with_them_is_the_step_without(family, off, dtype, apart):
    config, kind, sizes = FAMILIES[family]
    prompts = [np.arange(1, 1 + length) for length in (1, 2, 9, 30)]
    ends, found = np.array([len(ids) for ids in prompts]), []
    for _ in range(2):
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
        off()
    assert kernels.library() is None
    for with_them, without in zip(*found, strict=True):
        torch.testing.assert_close(with_them, without, atol=apart, rtol=apart / 5)

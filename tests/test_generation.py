"""The generation engine against a brute-force forward pass of the Hugging Face model, row by row, without a cache."""

import itertools

import numpy as np
import pytest
import torch
from crossed import crossed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.overrides import TorchFunctionMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlhf_ray.config.sampling_params import SamplingParams
from rlhf_ray.errors import UserError
from rlhf_ray.generation import graph_step, ragged_decoder
from rlhf_ray.generation.engine import GenerationEngine
from rlhf_ray.generation.kv_cache import RaggedCache, ragged_attention
from rlhf_ray.generation.ragged_decoder import RaggedDecoder
from rlhf_ray.generation.row_batch import row_uniforms

VOCAB, EOS = 61, 1
ENDS = (1, 11, 21, 31, 41)  # several EOS tokens: random models rarely draw one, and rows must end at different steps


class LetterTokenizer:
    """Token t is the letter chr(97 + t % 26), so every text is easy to predict."""

    eos_token_id = EOS

    def decode(self, ids, **kwargs):
        return "".join(chr(97 + token % 26) for token in ids)


def build(family: str, dtype=torch.float32, attention="sdpa", **kwargs):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": EOS,
        "initializer_range": 0.2,
        **kwargs,
    }
    grouped = {"num_key_value_heads": 2, "intermediate_size": 48}
    config, model = {
        "gpt2": (GPT2Config, GPT2LMHeadModel),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM),
    }[family]
    grouped = {} if family == "gpt2" else {"intermediate_size": 48} if family == "gpt_neox" else grouped
    return model._from_config(config(**sizes, **grouped), attn_implementation=attention).to(dtype).eval()


def make_engine(model, eos_token_ids=ENDS, **kwargs):
    return GenerationEngine(model, LetterTokenizer(), eos_token_ids=eos_token_ids, **kwargs)


def ragged_prompts(count=9, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(2, VOCAB, length).tolist() for length in generator.permutation(np.arange(1, count + 1))]


def reference_distribution(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities [V] in float64, one token at a time: the definition, not the engine's way of computing it."""
    if params.temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    probs = np.exp((logits - logits.max()) / params.temperature)
    probs /= probs.sum()
    ranked = np.argsort(-probs, kind="stable")
    if params.top_k:
        ranked = ranked[: params.top_k]
    kept, mass = [], 0.0
    for token in ranked:
        if params.top_p == 1 or mass < params.top_p * probs[ranked].sum():
            kept.append(token)
        mass += probs[token]
    kept = [token for token in kept if probs[token] >= params.min_p * probs.max()]
    result = np.zeros_like(probs)
    result[kept] = probs[kept]
    return result / result.sum()


@torch.no_grad()
def brute_force(model, prompt, seed, params, ends=ENDS):
    """(tokens, log-probs, finish reason) of one row: a full forward pass a token, no cache, no batch, no padding."""
    uniforms, ids, logprobs = row_uniforms(seed, params.max_new_tokens), list(prompt), []
    for uniform in uniforms:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1].double().numpy()
        probs = reference_distribution(logits, params)
        token = int(np.searchsorted(np.cumsum(probs), uniform, side="right"))
        ids.append(token)
        shown = reference_distribution(logits, SamplingParams()) if params.temperature == 0 else probs
        logprobs.append(np.log(shown[token]))
        text = LetterTokenizer().decode(ids[len(prompt) :])
        if token in ends and len(logprobs) >= params.min_new_tokens:
            return ids[len(prompt) :], logprobs, "eos"
        if any(stop in text for stop in params.stop):
            return ids[len(prompt) :], logprobs, "stop"
    return ids[len(prompt) :], logprobs, "length"


def assert_matches(completion, expected):
    tokens, logprobs, reason = expected
    assert completion.response_ids.tolist() == tokens
    np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-5, rtol=0)
    assert completion.finish_reason == reason
    assert completion.response_ids.dtype == np.int32 and completion.logprobs.dtype == np.float32


OPTIONS = [
    SamplingParams(max_new_tokens=20),
    SamplingParams(max_new_tokens=20, temperature=0.7, top_k=5),
    SamplingParams(max_new_tokens=20, temperature=1.3, top_p=0.8),
    SamplingParams(max_new_tokens=20, min_p=0.1),
    SamplingParams(max_new_tokens=20, top_k=20, top_p=0.9, min_p=0.05, stop=("q", "zz")),
    SamplingParams(max_new_tokens=20, temperature=0.0),
]


@crossed(
    "family, attention, params",
    [("gpt2", "sdpa"), ("llama", "sdpa"), ("qwen2", "sdpa"), ("mistral", "sdpa"), ("gpt_neox", "sdpa"), ("gpt2", "eager"),
     ("llama", "eager")],
    dict(zip(["plain", "top_k", "top_p", "min_p", "all and stop", "greedy"], OPTIONS, strict=True)),
)  # fmt: skip
def test_equals_a_forward_pass_without_cache(family, attention, params):
    model, prompts = build(family, attention=attention), ragged_prompts()
    expected = [brute_force(model, prompt, seed, params) for seed, prompt in enumerate(prompts)]
    completions = make_engine(model).generate(prompts, range(len(prompts)), params)
    for completion, row in zip(completions, expected, strict=True):
        assert_matches(completion, row)
    if params == OPTIONS[0]:  # rows end at different steps, so the batch really was compacted on the way
        assert len({len(completion.response_ids) for completion in completions}) > 2


def test_rows_with_params_of_their_own_share_a_batch():
    model, prompts = build("llama"), ragged_prompts(12)
    params = [OPTIONS[row % len(OPTIONS)] for row in range(len(prompts))]
    completions = make_engine(model).generate(prompts, range(100, 112), params)
    for row, completion in enumerate(completions):
        assert_matches(completion, brute_force(model, prompts[row], 100 + row, params[row]))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_result_depends_on_nothing_that_ran_before(family, dtype):
    """Bitwise, and with caches full of junk instead of zeros: what is masked changes no bit."""
    engine, prompts = make_engine(build(family, dtype)), ragged_prompts()
    params = SamplingParams(max_new_tokens=24, temperature=1.2)
    fresh = engine.generate(prompts, range(9), params)
    engine.generate(ragged_prompts(5, seed=3), range(5), SamplingParams(max_new_tokens=30, top_k=3))
    engine.submit(prompts[0], 0, params)
    engine.step()
    make_cache = engine.decoder.new_cache

    def junk_cache(*rows):
        cache = make_cache(*rows)
        for layer in cache.layers:

            def initialise(keys, values, layer=layer, zeros=layer.lazy_initialization):
                zeros(keys, values)
                for stored in (layer.keys, layer.values):
                    stored.copy_(torch.randn_like(stored, dtype=torch.float32) * 1e4)

            layer.lazy_initialization = initialise
        return cache

    for new_cache in (make_cache, junk_cache):
        engine.decoder.new_cache = new_cache
        again = engine.generate(prompts, range(9), params)
        for one, other in zip(fresh, again, strict=True):
            np.testing.assert_array_equal(one.response_ids, other.response_ids)
            np.testing.assert_array_equal(one.logprobs.view(np.int32), other.logprobs.view(np.int32))


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_rows_that_join_and_leave_change_no_other_row(family):
    model, prompts = build(family), ragged_prompts(10)
    params = [OPTIONS[row % len(OPTIONS)] for row in range(10)]
    engine = make_engine(model, max_rows=4)
    ids, done, streamed, steps, cancelled = [], {}, {}, 0, set()
    while len(done) + len(cancelled) < 10:
        if steps % 2 == 0 and len(ids) < 10:  # two join every second step; with four rows, some have to wait
            for row in range(len(ids), len(ids) + 2):
                ids.append(engine.submit(prompts[row], row, params[row]))
        if steps == 3:
            cancelled.add(1)
            assert engine.cancel(ids[1]) and not engine.cancel(ids[1])
        assert engine.num_running <= 4
        for event in engine.step():
            streamed.setdefault(event.request_id, []).append((event.token_id, event.logprob))
            if event.completion is not None:
                done[event.request_id] = event.completion
        steps += 1
    assert engine.num_running == engine.num_waiting == 0 and engine.step() == []
    for row in set(range(10)) - cancelled:
        assert_matches(done[ids[row]], brute_force(model, prompts[row], row, params[row]))
        assert [token for token, _ in streamed[ids[row]]] == done[ids[row]].response_ids.tolist()
        assert [logprob for _, logprob in streamed[ids[row]]] == pytest.approx(done[ids[row]].logprobs.tolist())
    assert ids[1] not in done


def test_a_waiting_request_can_be_cancelled():
    engine = make_engine(build("gpt2"), max_rows=1)
    first, second = (engine.submit([5, 6], seed, SamplingParams(max_new_tokens=2, min_new_tokens=2)) for seed in (0, 1))
    engine.step()
    assert engine.num_waiting == 1 and engine.cancel(second)
    assert [event.request_id for event in engine.step()] == [first]
    assert engine.num_running == engine.num_waiting == 0


def test_uniforms_belong_to_seed_and_token_only():
    long, short = row_uniforms(7, 50), row_uniforms(7, 3)
    np.testing.assert_array_equal(long[:3], short)
    assert long.dtype == np.float32 and (row_uniforms(8, 50) != long).any()
    assert long.min() >= 0 and long.max() < 1


def test_eos_is_part_of_the_response_and_ends_it():
    model, params = build("gpt2"), SamplingParams(max_new_tokens=40)
    engine = GenerationEngine(model, LetterTokenizer())  # the tokenizer's EOS
    completions = engine.generate([[4, 5]] * 40, range(40), params)
    ended = [c for c in completions if c.finish_reason == "eos"]
    assert len(ended) > 3
    assert all(c.response_ids[-1] == EOS and EOS not in c.response_ids[:-1] for c in ended)
    others = [c for c in completions if c.finish_reason != "eos"]
    assert all(c.finish_reason == "length" and len(c.response_ids) == 40 and EOS not in c.response_ids for c in others)
    late = engine.generate([[4, 5]] * 40, range(40), SamplingParams(max_new_tokens=40, min_new_tokens=12))
    for early, completion in zip(
        completions, late, strict=True
    ):  # what comes before an EOS does not depend on the minimum
        assert completion.response_ids[: len(early.response_ids)].tolist() == early.response_ids.tolist()
        assert len(completion.response_ids) >= 12
    assert any(EOS in c.response_ids[:11] for c in late)
    assert any(len(c.response_ids) < 40 and c.finish_reason == "eos" for c in late)
    fixed = engine.generate([[4, 5]] * 40, range(40), SamplingParams(max_new_tokens=40, min_new_tokens=40))
    assert {len(c.response_ids) for c in fixed} == {40}
    several = make_engine(model, eos_token_ids=[EOS, 9]).generate([[4, 5]] * 40, range(40), params)
    assert {int(c.response_ids[-1]) for c in several if c.finish_reason == "eos"} == {EOS, 9}


def test_a_stop_string_may_span_tokens_and_stays_in_the_response():
    model = build("gpt2")
    plain = make_engine(model).generate([[4, 5]] * 8, range(8), SamplingParams(max_new_tokens=30, min_new_tokens=30))
    texts = [LetterTokenizer().decode(c.response_ids) for c in plain]
    stop = texts[0][10:13]
    stopped = make_engine(model).generate(
        [[4, 5]] * 8, range(8), SamplingParams(max_new_tokens=30, min_new_tokens=30, stop=(stop, "never seen"))
    )
    for text, completion in zip(texts, stopped, strict=True):
        end = text.find(stop) + len(stop) if stop in text else 30
        assert LetterTokenizer().decode(completion.response_ids) == text[:end]
        last = "eos" if completion.response_ids[-1] in ENDS else "length"
        assert completion.finish_reason == ("stop" if stop in text else last)
    assert stopped[0].finish_reason == "stop"


def test_stop_strings_are_found_in_text_of_several_byte_characters():
    """Byte-level BPE with one token a byte: a character's last byte, not its first, completes the stop string."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: place for place, byte in enumerate(alphabet)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    engine = GenerationEngine(build("gpt2", vocab_size=256), tokenizer, eos_token_ids=[])
    plain = engine.generate([[4, 5]] * 30, range(30), SamplingParams(max_new_tokens=60))
    texts = [tokenizer.decode(c.response_ids.tolist()) for c in plain]
    row, stop = next((row, letter) for row, text in enumerate(texts) for letter in text if "\x80" < letter < "\ufffd")
    stopped = engine.generate([[4, 5]], [row], SamplingParams(max_new_tokens=60, stop=(stop,)))[0]
    ids = plain[row].response_ids.tolist()
    first = next(k for k in range(1, 61) if stop in tokenizer.decode(ids[:k]))
    assert stopped.response_ids.tolist() == ids[:first] and stopped.finish_reason == "stop"
    assert len(stop.encode()) > 1


def test_the_engine_draws_first_tokens_with_the_models_frequencies():
    model, count = build("llama"), 4000
    params = SamplingParams(max_new_tokens=1, temperature=1.5, top_k=8)
    with torch.no_grad():
        probs = reference_distribution(model(torch.tensor([[7, 8, 9]])).logits[0, -1].double().numpy(), params)
    first = [c.response_ids[0] for c in make_engine(model).generate([[7, 8, 9]] * count, range(count), params)]
    seen = np.bincount(first, minlength=VOCAB) / count
    assert (seen[probs == 0] == 0).all() and (probs > 0).sum() == 8
    assert (np.abs(seen - probs) < 4 * np.sqrt(probs * (1 - probs) / count) + 1e-12).all()


@pytest.mark.parametrize("tied", [True, False])
def test_load_weights_copies_and_keeps_nothing(tied):
    engine = make_engine(build("llama", tie_word_embeddings=tied))
    torch.manual_seed(9)
    other = LlamaForCausalLM._from_config(engine.model.config).eval()
    prompts, params = ragged_prompts(), SamplingParams(max_new_tokens=10)
    expected = make_engine(other).generate(prompts, range(9), params)
    before = engine.generate(prompts, range(9), params)

    state = {name: weight.numpy() for name, weight in other.state_dict().items()}
    if tied:
        del state["lm_head.weight"]  # counts once: the embedding brings it
    for array in state.values():
        array.flags.writeable = False
    engine.load_weights(state)
    after = engine.generate(prompts, range(9), params)
    assert all(
        (a.response_ids == e.response_ids).all() and (a.logprobs == e.logprobs).all()
        for a, e in zip(after, expected, strict=True)
    )
    assert any(
        len(a.response_ids) != len(b.response_ids) or (a.response_ids != b.response_ids).any()
        for a, b in zip(after, before, strict=True)
    )
    addresses = {array.__array_interface__["data"][0] for array in state.values()}
    assert not addresses & {weight.data_ptr() for weight in engine.model.state_dict().values()}


def test_load_weights_is_strict_and_changes_nothing_when_it_refuses():
    engine = make_engine(build("gpt2"))
    before = {name: weight.clone() for name, weight in engine.model.state_dict().items()}
    state = {name: weight + 1 for name, weight in before.items()}
    for broken, word in [
        ({k: v for k, v in state.items() if k != "transformer.h.1.ln_1.bias"}, "ln_1.bias"),
        ({**state, "stranger": torch.zeros(1)}, "stranger"),
        ({**state, "transformer.ln_f.bias": torch.zeros(3)}, "ln_f.bias"),
    ]:
        with pytest.raises(ValueError, match=word):
            engine.load_weights(broken)
    assert all(torch.equal(weight, before[name]) for name, weight in engine.model.state_dict().items())
    engine.submit([5], 0, SamplingParams())
    with pytest.raises(RuntimeError, match="cancel"):
        engine.load_weights(state)


def test_bfloat16_weights_arrive_as_int16_bits():
    engine = make_engine(build("gpt2", torch.bfloat16))
    torch.manual_seed(4)
    state = {name: torch.randn_like(weight) for name, weight in engine.model.state_dict().items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    engine.load_weights({name: weight.view(torch.int16).numpy() for name, weight in state.items()})
    assert all(torch.equal(weight, state[name]) for name, weight in engine.model.state_dict().items())


def test_bfloat16_stays_near_the_models_own_forward():
    model, prompts = build("qwen2", torch.bfloat16, initializer_range=0.05), ragged_prompts()
    completions = make_engine(model).generate(prompts, range(9), SamplingParams(max_new_tokens=12))
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt + completion.response_ids.tolist()])
        with torch.no_grad():
            logprobs = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        expected = logprobs.gather(-1, ids[0, len(prompt) :, None].long()).squeeze(-1)
        np.testing.assert_allclose(completion.logprobs, expected.numpy(), atol=2e-2, rtol=0)


@crossed(
    "dtype, near, kv_heads, bias", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)],
    [(8, 0.0), (4, 0.0), (1, 0.0), (4, 100.0)],
)  # fmt: skip
def test_decode_attention_of_rows_with_different_lengths(dtype, near, kv_heads, bias):
    """A head of its own for each query head, shared ones, and one for all; keys with a bias, which gives all of a row's scores a
    large common part; against float64 written out."""
    torch.manual_seed(0)
    rows, heads, length, channels = 5, 8, 2048, 64
    query = torch.randn(rows, heads, 1, channels)
    key, value = (torch.randn(rows, kv_heads, length, channels) for _ in range(2))
    if bias:
        query[..., 0], key[..., 0] = 4.0, key[..., 0] + bias
    query, key, value = (states.to(dtype) for states in (query, key, value))
    lengths = torch.tensor([1, 700, 2048, 5, 1500])
    mask = torch.arange(length) < lengths[:, None]
    cache = RaggedCache(1, centred=dtype == torch.bfloat16)
    cache.reserve(rows, length)
    cache.begin_prefill(0, (lengths - 1).clamp(min=1))
    cache.layers[0].update(key, value)
    cache.begin_decode(lengths - 1, length)
    last = (torch.arange(rows), slice(None), lengths - 1)
    stored = cache.layers[0].update(key[last][:, :, None], value[last][:, :, None])
    output, _ = ragged_attention(torch.nn.Module(), query, *stored, mask[:, None, None], scaling=0.2)
    assert output.shape == (rows, 1, heads, channels)
    for row in range(rows):
        for head in range(heads):
            own = head * kv_heads // heads
            k, v = key[row, own, mask[row]].double(), value[row, own, mask[row]].double()
            expected = torch.softmax(k @ query[row, head, 0].double() * 0.2, 0) @ v
            torch.testing.assert_close(output[row, 0, head].double(), expected, atol=near, rtol=near)


def test_keys_are_stored_from_their_rows_centre():
    """Which moves with its row, and is the mean of the prompt's own keys, not of padding."""
    torch.manual_seed(0)
    cache = RaggedCache(1, centred=True)
    cache.reserve(3, 8)
    key, value, new = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5), torch.randn(2, 2, 1, 5)
    cache.begin_prefill(0, torch.tensor([4, 1, 3]))
    cache.layers[0].update(key, value)
    cache.move_rows(torch.tensor([2]), torch.tensor([0]), 3)
    cache.begin_decode(torch.tensor([3, 1]), 8)
    layer = cache.layers[0]
    keys, values = layer.update(new, new)
    for row, before, length in ((0, 2, 3), (1, 1, 1)):
        centre = key[before, :, :length].mean(1, keepdim=True)
        expected = torch.cat((key[before, :, :length], new[row]), 1) - centre
        torch.testing.assert_close(keys[row, :, : length + 1], expected)
        torch.testing.assert_close(values[row, :, : length + 1], torch.cat((value[before, :, :length], new[row]), 1))


def test_slots_of_long_rows_go_when_they_have_left():
    """A busy server's batch never empties: one long request must not slow all later ones down."""
    engine = make_engine(build("gpt2", max_position_embeddings=512), [])
    params = SamplingParams(max_new_tokens=30, min_new_tokens=30)
    alone = engine.generate([[7, 8, 9]], [5], params)[0]
    engine.submit([3] * 400, 1, SamplingParams(max_new_tokens=2))
    engine.submit([7, 8, 9], 5, params)
    engine.step()
    assert engine._open.cache.write.slots >= 400
    completions, slots = [], []
    while engine.num_running:
        slots.append(engine._open.cache.write.slots)
        completions += [event.completion for event in engine.step() if event.completion is not None]
    assert slots[0] >= 400 and slots[-1] <= 64
    assert completions[-1].response_ids.tolist() == alone.response_ids.tolist()
    np.testing.assert_allclose(completions[-1].logprobs, alone.logprobs, atol=1e-5)


def test_a_prompt_of_one_token_has_a_centre():
    decoder = RaggedDecoder(build("gpt2", torch.bfloat16))
    cache = decoder.new_cache()
    cache.reserve(2, 1)
    with torch.inference_mode():
        decoder.prefill(cache, 0, [np.array([3]), np.array([4])])
    assert cache.layers[0].centres.abs().sum() > 0


@crossed("family, tied", ["gpt2", "llama", "qwen2"], [True, False])
@torch.inference_mode()
def test_the_written_out_step_is_the_models_forward(family, tied):
    model = build(family, tie_word_embeddings=tied)
    decoder = RaggedDecoder(model)
    assert decoder.step is not None
    prompts = [np.array(ids) for ids in ragged_prompts()]
    found = []
    for step in (decoder.step, None):
        decoder.step, cache = step, decoder.new_cache()
        cache.reserve(len(prompts), 9)
        decoder.prefill(cache, 0, prompts)
        ends = np.array([len(ids) for ids in prompts])
        first = decoder.decode(cache, np.array([ids[-1] for ids in prompts]), ends - 1)
        found.append((first, decoder.decode(cache, np.arange(3, 12), ends)))
    for written_out, forward in zip(*found, strict=True):
        torch.testing.assert_close(written_out, forward, atol=1e-5, rtol=1e-5)


def test_families_without_a_written_out_step():
    """A class of one's own, and a family that is not known, go through forward."""

    class Mine(LlamaForCausalLM):
        pass

    for family in ("mistral", "gpt_neox"):
        assert make_engine(build(family)).decoder.step is None
    mine = build("llama")
    mine.__class__ = Mine
    assert make_engine(mine).decoder.step is None


@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"]
)
def test_the_model_stays_right_for_other_callers(dtype, near):
    """The engine changes the model's attention; a padded batch without its cache must still mask the padding."""
    model = build("llama", dtype)
    ids, mask = torch.tensor([[0, 0, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 1, 2]])
    with torch.no_grad():
        alone = model(ids[:, 2:]).logits[0, -1]
        make_engine(model)
        padded = model(ids, attention_mask=mask, position_ids=positions).logits[0, -1]
        plain = model.generate(ids[:, 2:], do_sample=False, max_new_tokens=5, pad_token_id=0)
    torch.testing.assert_close(padded, alone, atol=near, rtol=0 if dtype == torch.float32 else near)
    greedy = make_engine(model, [EOS]).generate([[5, 6, 7]], [0], SamplingParams(max_new_tokens=5, temperature=0.0))
    assert plain[0, 3:].tolist() == greedy[0].response_ids.tolist()


def test_a_family_that_is_compared_when_it_is_built_may_be_in_bfloat16():
    assert make_engine(build("mistral", torch.bfloat16, initializer_range=0.05)).decoder.reads_all_slots


def test_refusals_name_the_value_and_the_remedy():
    engine, params = make_engine(build("gpt2")), SamplingParams(max_new_tokens=60)
    full = engine.generate([[3, 4, 5, 6]], [0], SamplingParams(max_new_tokens=60, min_new_tokens=60))
    assert len(full[0].response_ids) == 60
    for prompt, word in (([3] * 5, "64"), ([], "no tokens"), ([3, VOCAB], "vocabulary")):
        with pytest.raises(UserError, match=word):
            engine.generate([[3], prompt], [0, 1], params)
        with pytest.raises(UserError, match=word):
            engine.submit(prompt, 0, params)
    windowed = make_engine(build("mistral", sliding_window=8))
    with pytest.raises(UserError, match="attends over 8"):
        windowed.generate([[3, 4]], [0], SamplingParams(max_new_tokens=7))
    assert_matches(
        windowed.generate([[3, 4]], [0], SamplingParams(max_new_tokens=6))[0],
        brute_force(windowed.model, [3, 4], 0, SamplingParams(max_new_tokens=6)),
    )
    for bad in (
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_k": -1},
        {"min_p": 1.0},
        {"max_new_tokens": 0},
        {"stop": ("",)},
        {"stop": "a"},
    ):
        with pytest.raises(UserError, match=next(iter(bad))):
            SamplingParams(**bad)


def test_a_broken_model_is_an_error_not_an_answer():
    engine = make_engine(build("gpt2"))
    good = {name: weight.clone() for name, weight in engine.model.state_dict().items()}
    engine.load_weights({name: weight * float("nan") for name, weight in good.items()})
    with pytest.raises(FloatingPointError, match="not finite"):
        engine.generate([[3, 4]], [0], SamplingParams())
    engine.submit([3, 4], 0, SamplingParams())
    with pytest.raises(FloatingPointError, match="not finite"):
        engine.step()
    engine.load_weights(good)  # nothing of the broken step is left
    engine.submit([3, 4], 0, SamplingParams(max_new_tokens=1))
    assert engine.step()[0].completion is not None


def test_an_empty_batch():
    assert make_engine(build("gpt2")).generate([], [], SamplingParams()) == []


@pytest.mark.gpu
def test_on_a_gpu_it_draws_what_the_cpu_draws():
    prompts, params = ragged_prompts(), [OPTIONS[row % len(OPTIONS)] for row in range(9)]
    for family in ("gpt2", "llama", "qwen2"):
        expected = make_engine(build(family)).generate(prompts, range(9), params)
        completions = make_engine(build(family), device="cuda").generate(prompts, range(9), params)
        for one, other in zip(completions, expected, strict=True):
            assert one.response_ids.tolist() == other.response_ids.tolist()
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4, rtol=0)


# -- long prompts, and room for the cache ------------------------------------------------------------------------------


@crossed("dtype, family", [torch.float32, torch.bfloat16], ["gpt2", "llama"])
def test_prompts_read_in_parts_draw_the_same(family, dtype, monkeypatch):
    """In parts of 7 tokens of 3 rows, one of them shorter than a part."""
    model, params = build(family, dtype), SamplingParams(max_new_tokens=6)
    prompts = [np.arange(1, 1 + length) % 20 for length in (3, 17, 26)]
    whole = make_engine(model).generate(prompts, [1, 2, 3], params)
    monkeypatch.setattr(ragged_decoder, "PREFILL_TOKENS", 3 * 7)
    parts = make_engine(model).generate(prompts, [1, 2, 3], params)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0)
        assert dtype == torch.bfloat16 or one.response_ids.tolist() == other.response_ids.tolist()


class Masks(TorchFunctionMode):
    """Notes the shapes of all masks that attention is given."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            mask = args[3] if len(args) > 3 else (kwargs or {}).get("attn_mask")
            self.shapes.append((args[0].shape[2], None if mask is None else tuple(mask.shape[-2:])))
        return func(*args, **(kwargs or {}))


def test_a_long_prompts_attention_has_no_mask_and_keeps_its_bits(monkeypatch):
    """The triangle of 400 tokens is the kernel's own; of a later part there is a mask of its tokens only."""
    model, params = build("llama", max_position_embeddings=512), SamplingParams(max_new_tokens=2)
    prompts = [np.arange(1, 1 + length) % 20 for length in (401, 30)]
    with Masks() as masks:
        found = make_engine(model).generate(prompts, [1, 2], params)
    assert (400, None) in masks.shapes and all(queries == 1 or mask is None for queries, mask in masks.shapes)
    triangle = torch.ones(400, 400, dtype=torch.bool).tril()[None, None]
    monkeypatch.setattr(RaggedDecoder, "_prefill_mask", lambda self, start, end: triangle)
    masked = make_engine(model).generate(prompts, [1, 2], params)
    assert [one.logprobs.tolist() for one in found] == [one.logprobs.tolist() for one in masked]
    monkeypatch.undo()
    monkeypatch.setattr(ragged_decoder, "PREFILL_TOKENS", 2 * 300)
    with Masks() as masks:
        make_engine(model).generate(prompts, [1, 2], params)
    assert (300, None) in masks.shapes and not any(mask == (400, 400) for _, mask in masks.shapes)


def run_all(engine, asked, budget):
    """(completion of each, the numbers of rows that ran together), never with a larger cache than allowed."""
    numbers, done, together = [engine.submit(*one) for one in asked], {}, []
    while engine.num_running or engine.num_waiting:
        events = engine.step()
        together.append({numbers.index(event.request_id) for event in events})
        done |= {event.request_id: event.completion for event in events if event.completion is not None}
        if engine._open is not None:
            assert engine._open.cache.write.rows * engine._open.cache.write.slots <= budget
    return [done[number] for number in numbers], [one for one, _ in itertools.groupby(together)]


SHORT, LONG = SamplingParams(max_new_tokens=21), SamplingParams(max_new_tokens=60)  # with their prompts 32 and 80 slots


@pytest.mark.parametrize("lengths, budget, expected", [
    # One of 80 after two of 32; what does not fit holds up those behind it.
    ((SHORT, SHORT, LONG, SHORT), 96, [{0, 1}, {2}, {3}]),
    # Two beside each other while the long one runs. When it has left, the batch goes on with more and shorter rows.
    ((LONG, *[SHORT] * 7), 160, [{0, 1}, {0, 2}, {0, 3}, {3, 4, 5, 6, 7}, {4, 5, 6, 7}]),
    ((LONG, SHORT, LONG, *[SHORT] * 4), 160, [{0, 1}, {0, 2}, {2, 3}, {4, 5, 6}]),
], ids=["turns", "shorter rows later", "in between"])  # fmt: skip
def test_requests_wait_until_the_cache_has_room(lengths, budget, expected):
    model = build("llama", max_position_embeddings=256)
    engine, free = (make_engine(model, (99,), max_rows=8, max_cache_tokens=most) for most in (budget, None))  # no EOS: all run on
    asked = [(np.arange(1, 6 + 2 * number % 7), number, params) for number, params in enumerate(lengths)]
    with pytest.raises(UserError, match=f"room for {budget}"):
        engine.submit(np.arange(1, 15), 1, SamplingParams(max_new_tokens=budget))
    done, together = run_all(engine, asked, budget)
    assert together == expected
    for completion, (prompt, seed, params) in zip(done, asked, strict=True):
        assert completion.response_ids.tolist() == free.generate([prompt], [seed], params)[0].response_ids.tolist()


# -- decode steps of fixed shapes --------------------------------------------------------------------------------------


@crossed("rows, family", {"rows end": {11, 8}, "the cache grows": {11}}, ["gpt2", "llama", "qwen2"])
def test_steps_of_fixed_shapes_draw_what_a_forward_pass_does(family, rows, monkeypatch):
    """As they are captured for a GPU, on rows that are padded to 8, or to the 11 that the cache has."""
    captures = []

    def captured(run, device):
        output = run().clone()
        captures.append(len(output))
        return lambda: output.copy_(run())  # it stands where it stood before

    monkeypatch.setattr(graph_step, "captured", captured)
    params = SamplingParams(max_new_tokens=24) if 8 in rows else SamplingParams(max_new_tokens=40, min_new_tokens=40)
    model, prompts = build(family), ragged_prompts(11)
    engine = make_engine(model, graphs=True)
    for prompt, seed, completion in zip(prompts, range(11), engine.generate(prompts, range(11), params), strict=True):
        assert_matches(completion, brute_force(model, prompt, seed, params))
    assert set(captures) == rows and 1 < len(captures) < 5
    assert not engine.decoder.step._captured  # the batch is over

"""A decode step made by one call: the same bits as the step it was recorded from, whatever changes between two of them."""

import gc
import weakref

import numpy as np
import pytest
import torch
from crossed import crossed
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rlhf_ray.config.sampling_params import SamplingParams
from rlhf_ray.cpu.compiled import call, library, of_thread
from rlhf_ray.cpu.recorded_step import RecordedStep
from rlhf_ray.cpu.recording import OtherWork, Program, Recording
from rlhf_ray.generation.engine import GenerationEngine
from rlhf_ray.generation.ragged_decoder import RaggedDecoder

pytest_plugins = ["processors"]
pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")
VOCABULARY = 90
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.1,
         "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "intermediate_size": 96}
FAMILIES = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(**SIZES)),
    "gpt2, untied": (GPT2LMHeadModel, GPT2Config(**SIZES, tie_word_embeddings=False)),
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, **GROUPED)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, **GROUPED)),
}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32, "rope_theta": 1e4},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
}  # fmt: skip


def build(family: str):
    torch.manual_seed(0)
    kind, config = FAMILIES[family]
    return kind(config)


def decoder_of(model, recordable: bool = True) -> RaggedDecoder:
    decoder = RaggedDecoder(model)
    assert isinstance(decoder.step, RecordedStep)
    decoder.step = decoder.step if recordable else decoder.step.step
    return decoder


def decoded(decoder, lengths=(3, 1, 7, 5), steps=12, between=lambda step: None):
    """Logits of `steps` decode steps, of a row less from the sixth on; the tokens are the same for everybody."""
    rows, draws = len(lengths), np.random.default_rng(0)
    cache = decoder.new_cache()
    cache.reserve(rows, 16)
    decoder.prefill(cache, 0, [np.arange(2, 2 + length) for length in lengths])
    positions, found = np.array(lengths) - 1, []
    for step in range(steps):
        if step == 6:
            positions = positions[:-1]
        between(step)
        found.append(decoder.decode(cache, draws.integers(0, VOCABULARY, rows)[: len(positions)], positions).clone())
        positions = positions + 1
    return found


def same(found, expected) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recorded_step_is_the_plain_one_to_the_bit(family, processor, monkeypatch):
    runs, run = [], Program.run
    monkeypatch.setattr(Program, "run", lambda program, n: (runs.append(n), run(program, n)))
    with torch.inference_mode():
        expected = decoded(decoder_of(build_for(family), recordable=False))
        assert runs == []
        found = decoded(decoder_of(build_for(family)))
    assert runs == [4] * 5 + [3] * 6  # all but the first
    assert same(found, expected)


def build_for(family):
    with torch.inference_mode(False):  # a weight that was made in it has no version
        return build(family)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_it_follows_the_weights_and_the_cache(family):
    """Weights that change in place or are others, and a cache that moves, while rows are running."""

    def disturb(model):
        def change(step):
            if step == 3:
                model.get_input_embeddings().weight.mul_(1.1)
                next(child for child in model.modules() if type(child).__name__ in ("Conv1D", "Linear")).weight.add_(
                    0.01
                )
            if step == 8:
                norm = model.transformer.ln_f if family == "gpt2" else model.model.norm
                norm.weight = nn.Parameter(norm.weight * 2)

        return change

    both = []
    for recordable in (True, False):
        model = build(family)
        decoder = decoder_of(model, recordable)
        with torch.no_grad():
            both.append(decoded(decoder, steps=40, between=disturb(model)))  # 32 slots, then more
    assert same(*both)


@pytest.mark.parametrize("rope", ROPES)
@torch.inference_mode()
def test_rotary_positions_of_every_kind(rope):
    """Against the model's own forward; dynamic ones depend on the sequence's length, and are not recorded."""
    with torch.inference_mode(False):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, **GROUPED, rope_parameters=ROPES[rope]))
    plain, lengths, steps = decoder_of(model), (3, 1, 7, 5), 30
    found = decoded(plain, lengths, steps)
    assert plain.step.is_recorded == (rope != "dynamic")
    plain.step = None
    for one, other in zip(found, decoded(plain, lengths, steps), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_an_engines_responses_are_the_same(monkeypatch):
    """Rows join and leave, and one's stop string ends it."""
    prompts, responses, recorded = [[2 + row, 5, 9][: 1 + row % 3] for row in range(20)], [], []
    forget = RecordedStep.forget
    monkeypatch.setattr(RecordedStep, "forget", lambda step: (recorded.append(step.is_recorded), forget(step)))
    for recordable in (True, False):
        engine = GenerationEngine(build("qwen2"), Letters(), eos_token_ids=(1, 11, 21), max_rows=7)
        engine.decoder = decoder_of(engine.model, recordable)
        each = [
            SamplingParams(max_new_tokens=5 + 3 * row, temperature=0.5 + row / 20, stop=("ab",)) for row in range(20)
        ]
        for row, (prompt, params) in enumerate(zip(prompts, each, strict=True)):
            engine.submit(prompt, row, params)
        events = []
        while step := engine.step():
            events += [(event.request_id, event.token_id, event.logprob) for event in step]
        responses.append(events)
        assert not recordable or not engine.decoder.step.is_recorded
    assert recorded == [True] and responses[0] == responses[1]


class Letters:
    eos_token_id = 1

    def decode(self, ids, **kwargs):
        return "".join(chr(97 + token % 26) for token in ids)


def test_a_step_with_other_work_is_not_recorded():
    """A layer of a class of one's own is not in C."""

    class Mine(nn.Linear):
        def forward(self, x):
            return super().forward(x).tanh()

    model = build("llama")
    mine = Mine(96, 64, bias=False)
    model.model.layers[1].mlp.down_proj = mine
    decoder = decoder_of(model)
    with torch.inference_mode():
        found = decoded(decoder)
        assert not decoder.step.is_recorded and found[5].isfinite().all()


COMPUTES = {
    "add": lambda x: x + 1, "mm|matmul": lambda x: x @ x, "zeros": lambda x: torch.zeros(3), "copy_": lambda x: x.copy_(x.t()),
    "to|_to_copy": lambda x: x.double(), "reshape|clone": lambda x: x.t().reshape(9),
    "contiguous|clone": lambda x: x.t().contiguous(),
    "linear_panels": lambda x: call("linear_panels", x, x, 3, 3, 1, 3),
}  # fmt: skip


@crossed("mode, name", [torch.inference_mode, torch.no_grad], list(COMPUTES))
def test_what_computes_in_a_recording_is_named(name, mode):
    """Also what copies, of which torch says that it is a view, and a function in C that is not of a decode step."""
    x = torch.arange(9.0).view(3, 3)
    with mode(), pytest.raises(OtherWork, match=name), Recording():
        COMPUTES[name](x)
    assert torch.equal(x, torch.arange(9.0).view(3, 3)) and of_thread.recording is None


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_what_only_looks_is_let_through(mode):
    x = torch.arange(6.0).view(2, 3)
    with mode(), Recording():
        looks = [x.view(6), x.t(), x[1], x.to(x.dtype), x.contiguous(), x.reshape(3, 2), *x.unbind(1), x.flatten()]
    assert all(each.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for each in looks)


def test_a_first_step_without_a_cache_is_not_recorded():
    """Prompts of one token have no prefill, so their first step makes the cache; twice the same is no reason to record that."""
    decoder = decoder_of(build("gpt2"))
    with torch.inference_mode():
        for _ in range(3):
            cache = decoder.new_cache()
            cache.reserve(2, 16)
            decoder.decode(cache, np.array([3, 4]), np.array([0, 0]))
            assert not decoder.step.is_recorded
        for position in (1, 2):
            decoder.decode(cache, np.array([3, 4]), np.array([position, position]))
        assert decoder.step.is_recorded


def test_with_gradients_or_autocast_it_goes_the_plain_way():
    for context in (torch.enable_grad(), torch.autocast("cpu", torch.bfloat16)):
        decoder = decoder_of(build("gpt2"))
        with torch.no_grad(), context:
            found = decoded(decoder)
        assert not decoder.step.is_recorded and found[-1].isfinite().all()
        for later in (torch.inference_mode(), torch.no_grad()):
            with later:
                decoded(decoder)
            assert decoder.step.is_recorded


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.inference_mode()
def test_rows_that_have_left_are_not_worked_on(family):
    """Their slots stay as they were, of which another row may be told that they are its own."""
    decoder = decoder_of(build_for(family))
    cache = decoder.new_cache()
    cache.reserve(2, 16)
    for position in range(3):
        decoder.decode(cache, np.array([3, 4]), np.array([position] * 2))
    before = [states[1].clone() for layer in cache.layers for states in (layer.keys, layer.values)]
    decoder.decode(cache, np.array([3]), np.array([3]))
    assert decoder.step.is_recorded
    assert same([states[1] for layer in cache.layers for states in (layer.keys, layer.values)], before)


@torch.inference_mode()
def test_a_recording_holds_no_cache():
    """One that nobody else holds is gone, and the next one, wherever it is, is recorded anew."""
    decoder, found = decoder_of(build_for("gpt2")), []
    for _ in range(2):
        cache = decoder.new_cache()
        cache.reserve(2, 16)
        for position in range(3):
            found.append(decoder.decode(cache, np.array([3, 4]), np.array([position] * 2)).clone())
        assert decoder.step.is_recorded
        keys = weakref.ref(cache.layers[0].keys)
        del cache
        gc.collect()
        assert keys() is None
    assert same(found[:3], found[3:])


def test_tensors_share_places_only_when_they_are_not_in_use():
    """Three layers need no more room than two: as many tensors are in use at once."""
    sizes = []
    for layers in (2, 3):
        model = GPT2LMHeadModel(GPT2Config(**SIZES | {"num_hidden_layers": layers}))
        decoder = decoder_of(model)
        with torch.inference_mode():
            decoded(decoder, steps=3)
        places = {place.data_ptr(): place.numel() for place in decoder.step._program._places.values()}
        sizes.append(sum(places.values()))
    assert sizes[0] == sizes[1]


def test_a_program_runs_later_and_not_when_it_is_recorded():
    """A line of one number, which less its mean is 0, so that the bias is left."""
    hidden, weight, bias = torch.tensor([[3.0]]), torch.tensor([1.0]), torch.tensor([-1.5])
    with Recording() as recording:
        result = torch.empty_like(hidden)
        call("add_and_normalise", hidden, None, weight, bias, result, 1, 1, 1e-5)
    program = Program(recording, result)
    assert hidden.item() == 3.0 and len(recording.calls) == 1
    program.run(1)
    assert program.result.item() == -1.5

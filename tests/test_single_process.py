"""PPO in one process takes the steps of the distributed loop, and refuses every key that it does not act on."""

import runpy
import sys

import pytest
import torch
from differences import saw
from in_process import LocalRoles
from loops import Diary, real_loop
from tiny import TEXTS, tiny_recipe, write_start
from transformers import AutoModelForCausalLM

from rlhf_ray.config import GenerationConfig, ModelConfig, PPOConfig, Recipe
from rlhf_ray.data.role_files import write_role
from rlhf_ray.errors import UserError
from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.ppo.single_process import SingleProcessPPO
from rlhf_ray.ppo.single_process_keys import ACTS_ON, NO_INFLUENCE, OTHER_SECTIONS
from rlhf_ray.ppo.step import check_enough, step_prompts
from rlhf_ray.runs.run_folder import RunFolder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    small = tiny_recipe(model={"from_scratch": {"layers": 1}})
    return write_start(small, RunFolder(tmp_path_factory.mktemp("single")))


def test_it_takes_the_same_steps_as_the_loop(folder):
    """Chunks of 4 and microbatches of 2 there, everything at once here: equal to rounding."""
    recipe = tiny_recipe(ppo={"dual_clip": 3.0, "loss_aggregation": "sequence_mean"})
    roles, diary = LocalRoles(recipe, folder), Diary()
    real_loop(recipe, roles, diary).run()
    single = SingleProcessPPO(recipe, folder)
    for step in range(4):
        metrics, theirs = single.step(step), diary.records[step + 1][1]
        for name in ("objective/score", "objective/kl", "objective/response_length", "value/explained_variance"):
            assert metrics[name] == pytest.approx(theirs[name], abs=1e-4), (step, name)
    for number, module in enumerate((single.policy, single.critic)):
        for name, tensor in module.named_parameters():
            gap = float((roles.weights()[f"{number}/{name}"] - tensor).detach().abs().max())
            assert saw("weights: one process against the roles", gap) < 1e-5, f"{name}: a step is up to 1e-3"


def test_a_function_gets_the_columns_it_asks_for(tmp_path):
    recipe = tiny_recipe(ppo={"reward_function": "user_scores:answer_of_row", "critic_init": "sft"}, reward=None)
    folder = write_start(recipe, RunFolder(tmp_path))
    rows = [{"prompt": text, "columns": {"answer": float(number)}} for number, text in enumerate(TEXTS[:16])]
    write_role(folder, "prompts", rows, ("prompt",))
    drawn = step_prompts(0, 16, recipe.ppo.rollout_batch_size, recipe.ppo_seed)
    metrics = SingleProcessPPO(recipe, folder).step(0)
    assert metrics["objective/score"] == pytest.approx(sum(drawn) / len(drawn), abs=1e-5)


# -- the recipe's keys ------------------------------------------------------------------------------------------------

# A second model for ppo.rewards would be the first one again: a function is enough to show that the key counts.
SLOW = {"reward_function": "user_scores:brevity", "reward_timeout_s": 0.5, "reward_timeout_score": -3.0}
# key -> sections that set it, chosen so that the first two steps must come out otherwise
CHANGES = {
    "ppo.steps": {"ppo": {"steps": 3}},
    "ppo.seed": {"ppo": {"seed": 5}},
    "ppo.rollout_batch_size": {"ppo": {"rollout_batch_size": 4}},
    "ppo.samples_per_prompt": {"ppo": {"samples_per_prompt": 2}},
    "ppo.minibatch_size": {"ppo": {"minibatch_size": 8}},
    "ppo.ppo_epochs": {"ppo": {"ppo_epochs": 1}},
    "ppo.learning_rate": {"ppo": {"learning_rate": 2e-3}},
    "ppo.critic_learning_rate": {"ppo": {"critic_learning_rate": 2e-3}},
    "ppo.anneal": {"ppo": {"anneal": False}},
    "ppo.adam_eps": {"ppo": {"adam_eps": 1e-2}},
    "ppo.max_grad_norm": {"ppo": {"max_grad_norm": 1e-4}},
    "ppo.kl_coef": {"ppo": {"kl_coef": 2.0}},
    "ppo.gamma": {"ppo": {"gamma": 0.5}},
    "ppo.gae_lambda": {"ppo": {"gae_lambda": 0.5}},
    "ppo.loss_aggregation": {"ppo": {"loss_aggregation": "sequence_mean"}},
    "ppo.clip_range": {"ppo": {"clip_range": 1e-4}},
    "ppo.clip_range_high": {"ppo": {"clip_range_high": 1e-4}},
    "ppo.dual_clip": {"ppo": {"dual_clip": 1.0001}},
    "ppo.value_clip_range": {"ppo": {"value_clip_range": 1e-4}},
    "ppo.vf_coef": {"ppo": {"vf_coef": 1e-4}},
    "ppo.whiten_rewards": {"ppo": {"whiten_rewards": True}},
    "ppo.whiten_advantages": {"ppo": {"whiten_advantages": False}},
    "ppo.missing_eos_penalty": {"ppo": {"missing_eos_penalty": 3.0}},
    "ppo.missing_eos_score": {"ppo": {"missing_eos_score": -3.0}},
    "ppo.score_clip": {"ppo": {"score_clip": 1e-3}},
    "ppo.overlong_buffer": {"ppo": {"overlong_buffer": 8}},
    "ppo.critic_init": {"ppo": {"critic_init": "sft"}},
    "ppo.reward_function": {"ppo": {"reward_function": "user_scores:shortest"}},
    "ppo.reward_timeout_s": {"ppo": SLOW},
    "ppo.reward_timeout_score": {"ppo": SLOW},
    "ppo.rewards": {"ppo": {"rewards": {"brief": {"function": "user_scores:shortest"}}}},
    "generation.max_new_tokens": {"generation": {"max_new_tokens": 5}},
    "generation.min_new_tokens": {"generation": {"min_new_tokens": 10}},
    "generation.temperature": {"generation": {"temperature": 0.5}},
    "generation.top_k": {"generation": {"top_k": 3}},
    "generation.top_p": {"generation": {"top_p": 0.3}},
    "generation.min_p": {"generation": {"min_p": 0.9}},
    "generation.stop": {"generation": {"stop": ()}},
}
ALONE = set(CHANGES) - {"ppo.reward_timeout_s", "ppo.reward_timeout_score", "generation.min_new_tokens"}
NEUTRAL = {
    "ppo.microbatch_size": 4,
    "ppo.microbatch_tokens": 64,
    "ppo.gradient_checkpointing": True,
    "ppo.precision": "bfloat16",
    "ppo.float32_head": True,
    "ppo.importance_cap": 1.5,
    "ppo.eval_every": 3,
    "ppo.eval_prompts": 5,
    "ppo.patience": 1,
    "ppo.roll_back": True,
    "ppo.checkpoint_every": 3,
    "ppo.checkpoint_minutes": 1.0,
    "ppo.keep_checkpoints": 3,
    "ppo.max_mismatch": 0.1,
    "ppo.max_mismatch_kl": 0.1,
    "ppo.max_first_approx_kl": 0.1,
    "ppo.publish_every": 1,
    "ppo.publish_share": 0.5,
    "generation.chunk_size": 2,
    "generation.precision": "bfloat16",
}
REFUSED = {
    "ppo.adaptive_kl": {"ppo": {"adaptive_kl": {}}},
    "ppo.advantage": {"ppo": {"advantage": "rloo", "samples_per_prompt": 2}},
    "ppo.kl_in": {"ppo": {"kl_in": "loss", "kl_estimator": "k2"}},
    "ppo.kl_estimator": {"ppo": {"kl_in": "loss", "kl_estimator": "k2"}},  # the other estimators are for the loss only
    "ppo.entropy_coef": {"ppo": {"entropy_coef": 0.01}},
    "ppo.max_approx_kl": {"ppo": {"max_approx_kl": 0.1}},
    "ppo.dynamic_sampling_rounds": {"ppo": {"dynamic_sampling_rounds": 1, "samples_per_prompt": 2}},
    "ppo.steps_ahead": {"ppo": {"steps_ahead": 1}},
    "ppo.importance_correction": {"ppo": {"importance_correction": True}},
    "ppo.weights_in_flight": {"ppo": {"weights_in_flight": True, "steps_ahead": 1}},
    "ppo.critic_warmup_steps": {"ppo": {"critic_warmup_steps": 1}},
    "ppo.adam_form": {"ppo": {"adam_form": "tensorflow"}},
    "ppo.lora": {"ppo": {"lora": {}}},
    "ppo.critic_lora": {"ppo": {"critic_lora": {}}},
    "ppo.freeze_layers": {"ppo": {"freeze_layers": 1}},
    "ppo.critic_freeze_layers": {"ppo": {"critic_freeze_layers": 1}},
    "generation.engine": {"generation": {"engine": "vllm"}},
    "model.trust_remote_code": {"model": {"trust_remote_code": True}},
}


def weights_after_two_steps(folder, **sections):
    single = SingleProcessPPO(tiny_recipe(**sections), folder)
    for step in range(2):
        single.step(step)
    return [tensor.detach().clone() for model in (single.policy, single.critic) for tensor in model.parameters()]


def same(one, other):
    return all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def unchanged(folder):
    return weights_after_two_steps(folder)


def test_every_key_is_acted_on_or_has_no_influence_or_is_refused():
    """A key that is new in a section belongs in a table of `single_process_keys`, and here beside its like."""
    sections = {"ppo": PPOConfig, "generation": GenerationConfig, "model": ModelConfig}
    for name, section in sections.items():
        acted, neutral = ACTS_ON[name], NO_INFLUENCE[name].keys()
        refused = {key.partition(".")[2] for key in REFUSED if key.startswith(f"{name}.")}
        assert not acted & neutral and acted | neutral | refused == section.model_fields.keys(), name
        assert not (acted | neutral) & refused, name
    assert Recipe.model_fields.keys() == {"name", "seed"} | sections.keys() | OTHER_SECTIONS.keys()
    tried = CHANGES.keys() | NEUTRAL.keys()
    untried = {f"{name}.{key}" for name in sections for key in (*ACTS_ON[name], *NO_INFLUENCE[name])} - tried
    assert untried == {
        "model.name_or_path",  # without SFT it names the start; the folder of the test has an SFT model
        "model.from_scratch", "model.chat_template",
        "ppo.reference",  # needs another model, see below
        "ppo.reuse_forward", "ppo.judge_evaluations", "ppo.best_by",  # they need other keys, see below
        "ppo.accept_weak_reward",  # asked before the start
        "generation.max_num_seqs", "generation.tensor_parallel",  # refused where the engine is not vLLM
    }  # fmt: skip


@pytest.mark.parametrize("key", sorted(ALONE))
def test_a_key_that_it_acts_on_changes_the_weights(folder, unchanged, key):
    assert not same(weights_after_two_steps(folder, **CHANGES[key]), unchanged)


@pytest.mark.thorough
def test_keys_that_need_others_change_the_weights_too(folder):
    """Against the same recipe without them."""
    few = {"rollout_batch_size": 2, "minibatch_size": 2}
    hasty = weights_after_two_steps(folder, ppo=SLOW | few)
    assert not same(hasty, weights_after_two_steps(folder, ppo=SLOW | few | {"reward_timeout_score": 3.0}))
    assert not same(hasty, weights_after_two_steps(folder, ppo=SLOW | few | {"reward_timeout_s": 60.0}))
    many = {"samples_per_prompt": 4}  # a random model draws EOS once in 300 tokens
    changes = [{}, {"min_new_tokens": 10}]
    assert not same(*(weights_after_two_steps(folder, ppo=many, generation={"stop": (), **change}) for change in changes))


def test_the_kl_is_measured_to_the_model_that_ppo_reference_names(folder, unchanged, tmp_path):
    """Its log-probs of the drawn responses are transformers' own of that model."""
    start = folder.stage("sft").model
    other = AutoModelForCausalLM.from_pretrained(start)
    with torch.no_grad():
        other.transformer.wte.weight *= 2
    other.save_pretrained(tmp_path / "other")
    load_tokenizer(start).save_pretrained(tmp_path / "other")
    sections = {"ppo": {"reference": str(tmp_path / "other")}}
    single = SingleProcessPPO(tiny_recipe(**sections), folder)
    rollout = single.draw(0)
    found = single.evaluate(rollout)
    with torch.no_grad():
        for row, (prompt, response) in enumerate(zip(rollout.sequences.prompts(), rollout.sequences.responses(), strict=True)):
            ids = torch.tensor([[*prompt, *response]])
            logprobs = other(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
            torch.testing.assert_close(found.ref_logprobs[row, : len(response)], logprobs, atol=1e-5, rtol=0)
    assert not same(weights_after_two_steps(folder, **sections), unchanged)


def test_keys_without_influence_leave_every_bit(folder, unchanged):
    """All at once: one of them that counted would show."""
    sections = {"ppo": {}, "generation": {}}
    for key, value in NEUTRAL.items():
        section, _, name = key.partition(".")
        sections[section][name] = value
    judged = {"judge_evaluations": True, "best_by": "judge"}
    other = weights_after_two_steps(
        folder, generation=sections["generation"], ppo=sections["ppo"] | judged,
        evaluation={"judge_function": "user_scores:shortest"}, resources={"policy": {"threads": 2}}, data={"max_prompt_tokens": 12},
    )  # fmt: skip
    assert same(other, unchanged)
    whole = {"minibatch_size": 8, "microbatch_size": 8}
    one, other = (weights_after_two_steps(folder, ppo=whole | {"reuse_forward": reuse}) for reuse in (False, True))
    assert same(one, other)


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_another_key_is_refused_by_name(folder, key):
    with pytest.raises(UserError, match=rf"^single_process does not act on .*{key} = .*set .*{key} to .*rlhf-ray run$"):
        SingleProcessPPO(tiny_recipe(**REFUSED[key]), folder)


def test_a_refusal_names_all_keys_with_their_defaults(folder):
    with pytest.raises(UserError) as refusal:
        SingleProcessPPO(tiny_recipe(ppo={"adaptive_kl": {}, "adam_form": "tensorflow", "critic_warmup_steps": 1}), folder)
    assert str(refusal.value) == (
        "single_process does not act on ppo.adaptive_kl = {...}, ppo.critic_warmup_steps = 1, ppo.adam_form = tensorflow; "
        "set ppo.adaptive_kl to null, ppo.critic_warmup_steps to 0, ppo.adam_form to torch, or run the recipe with rlhf-ray run"
    )


def as_a_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["single_process", *arguments])
    monkeypatch.delitem(sys.modules, "rlhf_ray.ppo.single_process", raising=False)  # runpy warns of one that is there already
    runpy.run_module("rlhf_ray.ppo.single_process", run_name="__main__")


def test_it_runs_from_a_run_folder(folder, monkeypatch, capsys):
    folder.recipe.write_text(tiny_recipe().model_dump_json())
    as_a_command(monkeypatch, str(folder.path), "--steps", "1")
    assert capsys.readouterr().out.startswith("step 1   score ")
    with pytest.raises(SystemExit) as ended:
        as_a_command(monkeypatch, str(folder.path / "nowhere"))
    assert ended.value.code == 2 and "nowhere" in capsys.readouterr().err


def test_too_few_prompts_and_no_steps_are_refused(folder, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="there are 3 prompts, fewer than ppo.rollout_batch_size = 4"):
        check_enough(3, 4)
    check_enough(4, 4)
    recipe = tiny_recipe()
    few = write_start(recipe, RunFolder(tmp_path))
    write_role(few, "prompts", [{"prompt": "a"}], ("prompt",))
    with pytest.raises(UserError, match="there are 1 prompts, fewer than ppo.rollout_batch_size"):
        SingleProcessPPO(recipe, few)
    folder.recipe.write_text(recipe.model_dump_json())
    for steps in ("0", "-3"):
        with pytest.raises(SystemExit) as ended:
            as_a_command(monkeypatch, str(folder.path), "--steps", steps)
        assert ended.value.code == 2 and f"{steps} PPO steps train nothing" in capsys.readouterr().err

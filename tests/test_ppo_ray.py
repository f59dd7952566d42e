"""PPO over real Ray actors, from start models to final model: stopped, resumed, spread over ranks. And waiting."""

import errno
import gc
import json
import os
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from differences import saw
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny import tiny_recipe, write_start

from rlhf_ray.actors.calls import members
from rlhf_ray.actors.groups import GenerationGroup, PolicyGroup
from rlhf_ray.actors.placement import Placement, check_fits
from rlhf_ray.actors.ppo_stage import run_ppo
from rlhf_ray.actors.ray_stages import check_cluster
from rlhf_ray.actors.role_actors import IN_FLIGHT
from rlhf_ray.actors.wait import ActorDied, CallReceipt, Deadline, Waiter
from rlhf_ray.config import RoleConfig
from rlhf_ray.errors import RunFailed, StageStopped, UserError
from rlhf_ray.models.load import build_reward_model, load_causal_lm
from rlhf_ray.models.save import save_model
from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.ppo.checkpoint import complete, last_good, read_role
from rlhf_ray.ppo.export_model import export_model
from rlhf_ray.ppo.step import cut_chunks
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.remote import in_store, local_copy
from rlhf_ray.runs.resume import write_recipe
from rlhf_ray.runs.run_folder import COPIES, RunFolder, working_copy
from rlhf_ray.tables.advantages import ADVANTAGES
from rlhf_ray.tables.engines import ENGINES
from rlhf_ray.tables.rewards import REWARDS

pytestmark = pytest.mark.ray

EVERY_STEP = {
    "objective/score", "objective/kl", "objective/rlhf_reward", "objective/kl_coef", "objective/response_length",
    "objective/eos_rate", "policy/loss", "policy/approx_kl", "policy/clip_frac", "policy/ratio", "policy/entropy",
    "policy/grad_norm", "policy/learning_rate", "policy/mismatch_p99", "policy/mismatch_max", "policy/mismatch_kl",
    "first_policy/ratio", "first_policy/approx_kl", "value/loss", "value/clip_frac", "value/explained_variance", "value/grad_norm",
    "rollout/tokens", "rollout/policy_version_min", "episodes", "samples_per_s", "time/generate_s", "time/score_s",
    "time/assemble_s", "time/update_s", "time/sync_s", "time/step_s", "busy/generation_s", "busy/policy_s",
    "busy/policy_update_s",
    "bytes/generation", "bytes/policy", "bytes/experience",
}  # fmt: skip
EVALUATED = {"eval/score", "eval/kl", "eval/response_length", "eval/eos_rate", "time/evaluate_s"}


@pytest.fixture(scope="module")
def new_folder(tmp_path_factory):
    return lambda name: write_start(tiny_recipe(), RunFolder(tmp_path_factory.mktemp(name)))


def ignore(progress):
    pass


def weights(folder):
    return load_file(folder.stage("ppo").model / "model.safetensors")


def largest_gap(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).detach().abs().max()) for name in one)


@pytest.fixture(scope="module")
def undisturbed(session, undisturbed_run):
    return undisturbed_run.folder, undisturbed_run.progress


def test_a_run_leaves_metrics_of_every_step(undisturbed):
    folder, events = undisturbed
    rows = read_metrics(folder.stage("ppo").metrics)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for row in rows[1:]:
        assert row.keys() >= EVERY_STEP
        assert row["first_policy/ratio"] == pytest.approx(1.0, abs=1e-5)
        assert row["policy/mismatch_max"] < 1e-5
        assert row["rollout/policy_version_min"] == row["step"] - 1
    assert [row["step"] for row in rows if row.keys() >= EVALUATED] == [0, 2, 4]
    assert [event["step"] for event in events if "metrics" in event] == [0, 1, 2, 3, 4]
    samples = [event["samples"] for event in events if "samples" in event]
    assert len(samples) == 3 and samples[0][0].keys() == {"step", "prompt", "response", "score"}


def test_a_run_leaves_a_model_a_summary_and_the_last_checkpoints(undisturbed):
    folder, _ = undisturbed
    stage = folder.stage("ppo")
    assert stage.summary()["steps"] == 4
    assert [path.name for path in complete(stage.checkpoints)] == ["step_000002", "step_000004"]
    assert last_good(stage.checkpoints, pytest.fail).name == "step_000004"
    load_causal_lm(stage.model)
    load_tokenizer(stage.model)
    assert "tiny" in (stage.model / "README.md").read_text()
    assert largest_gap(weights(folder), load_file(folder.stage("sft").model / "model.safetensors")) > 1e-4


def test_a_stopped_and_resumed_run_ends_in_the_same_bits(undisturbed, new_folder):
    folder = new_folder("stopped")
    stage = folder.stage("ppo")

    def stop_after_three(progress):
        if progress.get("step") == 3 and "metrics" in progress:
            stage.stop_file.touch()

    with pytest.raises(StageStopped, match="after step 3 of 4"):
        run_ppo(tiny_recipe(), folder, stop_after_three)
    assert [path.name for path in complete(stage.checkpoints)] == ["step_000002", "step_000003"]
    assert not stage.done
    stage.stop_file.unlink()  # as run_stages does before it starts a stage
    run_ppo(tiny_recipe(), folder, ignore)
    gap = largest_gap(weights(folder), weights(undisturbed[0]))
    assert saw("weights after 4 steps over Ray: stopped and resumed", gap) == 0.0
    same = ("step", "objective/score", "objective/kl", "policy/loss", "value/loss", "eval/score")
    rows = [
        [{name: row.get(name) for name in same} for row in read_metrics(each.stage("ppo").metrics)]
        for each in (folder, undisturbed[0])
    ]
    assert rows[0] == rows[1]
    assert stage.summary() == undisturbed[0].stage("ppo").summary()


@pytest.mark.thorough
def test_a_run_in_a_store_whose_copy_is_deleted_ends_in_the_same_bits(undisturbed, tmp_path, monkeypatch):
    """On this host nothing is left of it; the store has the checkpoint of the step at which it stopped."""
    monkeypatch.setenv(COPIES, str(tmp_path / "copies"))
    url = f"file://{tmp_path}/store/run"
    folder = RunFolder(working_copy(url), url)
    stage = folder.stage("ppo")

    def stop_after_two(progress):
        if progress.get("step") == 2 and "metrics" in progress:
            stage.stop_file.touch()

    with pytest.raises(StageStopped, match="after step 2 of 4"), in_store(folder, 120, every_s=0.2) as stored:
        write_start(tiny_recipe(), stored.folder)
        run_ppo(tiny_recipe(), stored.folder, stop_after_two)
    shutil.rmtree(folder.path)
    with in_store(folder, 120, every_s=0.2) as stored:
        assert last_good(stage.checkpoints, pytest.fail).name == "step_000002"
        run_ppo(tiny_recipe(), stored.folder, ignore)
    fetched = local_copy(f"{url}/ppo/model")
    gap = largest_gap(load_file(fetched / "model.safetensors"), weights(undisturbed[0]))
    assert saw("weights after 4 steps over Ray: stopped, its copy deleted, gone on from the store", gap) == 0.0
    assert [row["step"] for row in read_metrics(stage.metrics)] == [0, 1, 2, 3, 4]


def test_two_ranks_and_two_generators_agree_with_one(undisturbed, new_folder):
    """The weights go to these two by broadcast, and to the one by the object store."""
    folder = new_folder("spread")
    group = {"actors": 2, "zero_stage": 3}
    recipe = tiny_recipe(resources={"generation": {"actors": 2}, "policy": group, "critic": group | {"zero_stage": 2},
                                    "weight_transport": "collective"})  # fmt: skip
    run_ppo(recipe, folder, ignore)
    gap = largest_gap(weights(folder), weights(undisturbed[0]))
    assert saw("weights after 4 steps over Ray: 2 generators, 2 ranks with ZeRO 3 and 2, for 1", gap) < 1e-5
    spread, alone = (read_metrics(each.stage("ppo").metrics) for each in (folder, undisturbed[0]))
    same = [[row.get("objective/response_length") for row in rows] for rows in (spread, alone)]
    assert same[0] == same[1], "the same responses were drawn"
    assert all(row["policy/mismatch_max"] < 1e-5 for row in spread[1:])


@pytest.fixture
def additions():
    """What the module toy_additions registers is gone again after the test."""
    yield
    for table in (ADVANTAGES, REWARDS, ENGINES):
        table.remove("toy")
    sys.modules.pop("toy_additions")


@pytest.mark.thorough
def test_additions_of_a_plugin_without_a_critic_and_with_dynamic_sampling(session, new_folder, additions):
    """No critic's actors, shards or checkpoints; rejected rollouts are let go. The actors import the plugin."""
    rewards = {"trained": {"model": "reward"}, "toy": {"kind": "toy", "weight": 3.0}}
    recipe = tiny_recipe(plugins=["toy_additions"], generation={"engine": "toy"}, ppo={
        "advantage": "toy", "samples_per_prompt": 2, "rollout_batch_size": 4, "dynamic_sampling_rounds": 2,
        "kl_in": "loss", "kl_estimator": "k3", "max_approx_kl": 1.0, "rewards": rewards,
    })  # fmt: skip
    folder = new_folder("critic-free")
    run_ppo(recipe, folder, ignore)
    rows = read_metrics(folder.stage("ppo").metrics)[1:]
    assert all(row["objective/score/toy"] == 1.0 for row in rows)
    assert all(abs(row["objective/score"] - row["objective/score/trained"] - 3.0) < 1e-5 for row in rows)
    made_by = [path.name.removeprefix("toy_engine_") for path in folder.stage("sft").model.glob("toy_engine_*")]
    assert len(made_by) == 1 and int(made_by[0]) != os.getpid()
    assert all(row["rollout/prompts_drawn"] >= 4 and "policy/kl_loss" in row for row in rows)
    assert not any(name.startswith("value/") for row in rows for name in row)
    files = {path.name for path in complete(folder.stage("ppo").checkpoints)[-1].iterdir()}
    assert not any("critic" in name for name in files)


@pytest.mark.thorough
def test_an_ensemble_a_slow_function_and_a_judge_end_in_the_best_model(session, new_folder):
    """A learning rate that spoils the policy: the judge likes an early one best, and that is what is left."""
    folder = new_folder("rewards")
    tokenizer = load_tokenizer(folder.stage("sft").model)
    member = folder.stage("reward").member(1)
    member.path.mkdir()
    other = build_reward_model(folder.stage("sft").model, tokenizer, seed=9)
    save_model(other, tokenizer, member.model, "another")
    function = {"function": "user_scores:brevity", "weight": 0.1, "timeout_s": 1.0, "timeout_score": -50.0}
    recipe = tiny_recipe(
        reward={"members": 2, "combine": "mean_minus_std"}, evaluation={"judge_function": "user_scores:shortest"},
        generation={"stop": ()}, ppo={
            "steps": 6, "eval_every": 1, "eval_prompts": 3, "rollout_batch_size": 4, "judge_evaluations": True,
            "best_by": "judge", "patience": 1, "roll_back": True, "checkpoint_every": 10, "keep_checkpoints": 1,
            "rewards": {"model": {"model": "reward"}, "brevity": function},
        },
    )  # fmt: skip
    run_ppo(recipe, folder, ignore)
    rows, done = read_metrics(folder.stage("ppo").metrics), folder.stage("ppo").summary()
    for row in rows[1:]:
        total = row["objective/score/model"] + 0.1 * row["objective/score/brevity"]
        assert row["objective/score"] == pytest.approx(total, abs=1e-4) and row["objective/disagreement"] > 0
    assert sum(row.get("objective/timeouts", 0) + row.get("eval/timeouts", 0) for row in rows) > 0
    judged = [row["eval/judge"] for row in rows]
    assert done["ended_by"] == "patience" and done["worse_since"] == 1 and done["steps"] == len(judged) - 1 < 6
    assert done["model_step"] == done["best_step"] == int(np.argmax(judged)) and done["best_score"] == max(judged)
    assert largest_gap(weights(folder), load_file(folder.best_model / "model.safetensors")) == 0.0
    trained, _ = read_role(last_good(folder.stage("ppo").checkpoints), "policy")
    last = {name.removeprefix("weight/model."): value for name, value in trained.items() if name.startswith("weight/")}
    assert (
        max(float((last[name] - value).abs().max()) for name, value in weights(folder).items() if name in last) > 1e-4
    )
    assert not list(folder.stage("ppo").path.glob(".best_*"))


@pytest.mark.thorough
@pytest.mark.parametrize("way", ["object_store", pytest.param("collective", marks=pytest.mark.slow)])
@pytest.mark.parametrize("in_flight", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_one_step_ahead_with_weights_in_flight(session, new_folder, way, in_flight):
    """Two generators: no sample is older than a version, generator and policy agree where both have the same weights."""
    recipe = tiny_recipe(
        ppo={"steps_ahead": 1, "weights_in_flight": in_flight},
        resources={"generation": {"actors": 2}, "weight_transport": way},
    )
    folder = new_folder(f"ahead-{way}-{in_flight}")
    run_ppo(recipe, folder, ignore)
    rows = read_metrics(folder.stage("ppo").metrics)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for row in rows[1:]:
        assert row["rollout/age_max"] <= 1 and row["first_policy/ratio"] == pytest.approx(1.0, abs=1e-5)
        assert row.keys() >= EVERY_STEP - {"policy/mismatch_p99", "policy/mismatch_max", "policy/mismatch_kl"}
    assert rows[1]["rollout/age_max"] == 0
    assert [row["policy/mismatch_max"] < 1e-5 for row in rows if row.keys() >= EVALUATED] == [True] * 3
    assert largest_gap(weights(folder), load_file(folder.stage("sft").model / "model.safetensors")) > 1e-4


@pytest.mark.slow
def test_the_longer_phase_hides_the_shorter():
    """Sleeping roles on two hosts: n steps take about n * max(generate, train), and alternating n * (generate + train)."""
    script = Path(__file__).parents[1] / "results/overlap/sleeping.py"
    command = [sys.executable, str(script), "--steps", "8", "--seconds", "0.6", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290, check=True)
    for row in json.loads(done.stdout):
        both = (row["generate"] + row["train"]) / max(row["generate"], row["train"])
        if row["mode"] == "alternating":
            assert row["over_max"] > 0.95 * both and row["age"] == 0
        else:
            assert row["over_max"] < 1 + 0.5 * (both - 1) and 0 < row["age"] <= 2, row


@pytest.mark.slow
def test_adapters_alone_train_move_and_are_saved(undisturbed, new_folder):
    """No reference actor, two generators, a second go from the first checkpoint; the saved model is merged."""
    recipe = tiny_recipe(
        ppo={"lora": {"rank": 2}, "critic_freeze_layers": 1, "learning_rate": 1e-2, "gradient_checkpointing": True,
             "steps": 3, "checkpoint_every": 1, "keep_checkpoints": 3},
        resources={"generation": {"actors": 2}},
    )  # fmt: skip
    whole = new_folder("adapters")
    write_recipe(recipe, whole.recipe)
    run_ppo(recipe, whole, ignore)
    rows, full = (read_metrics(each.stage("ppo").metrics) for each in (whole, undisturbed[0]))
    assert all("busy/reference_s" not in row and row["policy/mismatch_max"] < 1e-4 for row in rows[1:])
    assert abs(rows[1]["objective/kl"]) < 1e-6 and abs(rows[3]["objective/kl"]) > 1e-3
    # 2 (in + out) floats of 4 bytes for each of 8 matrices, against all weights; the rest is log-probs, now twice.
    adapter, all_weights = 2 * 2 * (128 + 64 + 160 + 160) * 4, 4 * sum(map(torch.numel, weights(whole).values()))
    logprobs = full[1]["bytes/policy"] - all_weights
    assert 0 < logprobs < rows[1]["bytes/policy"] - adapter < 4 * logprobs < all_weights / 10

    stage, undisturbed_weights = whole.stage("ppo"), weights(whole)
    for later in complete(stage.checkpoints)[1:]:
        shutil.rmtree(later)
    run_ppo(recipe, whole, ignore)
    assert largest_gap(weights(whole), undisturbed_weights) == 0.0

    state = load_file(complete(stage.checkpoints)[-1] / "policy-00-of-01.safetensors")
    assert len(state) == 3 * 2 * 8 and all(".lora_" in name for name in state)
    start = load_file(whole.stage("sft").model / "model.safetensors")
    assert largest_gap(weights(whole), start) > 1e-4
    assert torch.equal(weights(whole)["transformer.wte.weight"], start["transformer.wte.weight"])
    exported = export_model(complete(stage.checkpoints)[-1], stage.path / "exported", "ppo", "float32", None)
    assert largest_gap(load_file(exported / "model.safetensors"), weights(whole)) == 0.0
    theirs = PeftModel.from_pretrained(
        load_causal_lm(whole.stage("sft").model), stage.path / "adapter"
    ).merge_and_unload()
    merged = dict(load_causal_lm(stage.model).named_parameters())
    assert largest_gap(dict(theirs.named_parameters()), merged) < 1e-6


# -- waiting ----------------------------------------------------------------------------------------------------------


@ray.remote(num_cpus=0)
class Toy:
    """Answers, fails or dies as it is told."""

    def answer(self, value, seconds=0.0):
        time.sleep(seconds)
        return value

    def large(self, size):
        return np.zeros(size), CallReceipt(0.5, 8 * size)

    def live(self, size, value):
        """An array that the next call writes over."""
        self.kept = getattr(self, "kept", {})
        array = self.kept.setdefault(size, np.zeros(size))
        array[:] = value
        return array

    def user_error(self):
        raise UserError("that won't do")

    def bug(self):
        raise ZeroDivisionError("ours")

    def full_disk(self, error):
        raise error

    def die(self):
        os._exit(1)

    def logprobs(self, rollout):
        return rollout, CallReceipt(0.5, 8)


@ray.remote(num_cpus=0, concurrency_groups={IN_FLIGHT: 1})
class SlowGenerator:
    """Says of each chunk how many syncs came before it."""

    version = 0

    def generate(self, chunk):
        version = self.version
        time.sleep(0.5)
        return version, CallReceipt(0.5, 8)

    def load_weights(self, version, *parts):
        self.version = version

    update_weights_in_flight = load_weights


@ray.remote(num_cpus=0, max_retries=0)
def dying_task():
    os._exit(1)


@pytest.fixture(scope="module")
def toy(session):
    """For tests that neither end it nor keep it busy."""
    actor = Toy.remote()
    yield actor
    ray.kill(actor)


def waiter(deadline_s=30.0, on_wait=lambda name, seconds, what: None):
    return Waiter(deadline_s, "raise the limit", on_wait)


def test_results_come_back_in_order_and_receipts_add_up(toy):
    waiting = waiter()
    refs = [waiting.track(toy.answer.remote(i), f"toy {i}") for i in range(3)]
    assert waiting.get(refs, "answers") == [0, 1, 2]
    for _ in range(2):
        result, receipt = toy.large.options(num_returns=2).remote(10)
        waiting.wait([waiting.track(result, "generation actor 0 (step 1, chunk 0)", receipt)], "large ones")
    assert waiting.take_totals() == {"busy/generation_s": 1.0, "bytes/generation": 160.0}
    assert waiting.take_totals() == {}


@pytest.mark.parametrize("size", [10, 1_000_000], ids=["in the answer", "in the store"])
def test_what_a_call_returned_is_not_what_the_next_call_writes_over(toy, size):
    """Why a policy may hand its live weights to Ray (`weight_transport.PolicyEnd.weights`)."""
    waiting = waiter()
    refs = [waiting.track(toy.live.remote(size, value), f"toy {value}") for value in (1.0, 2.0, 3.0)]
    assert [set(array) for array in waiting.get(refs, "arrays")] == [{1.0}, {2.0}, {3.0}]


def test_a_users_error_comes_out_as_it_was_raised(toy):
    waiting = waiter()
    failed = waiting.track(toy.user_error.remote(), "toy (first)")
    with pytest.raises(UserError, match="^that won't do$"):
        waiting.wait([failed], "a test")
    taken_along = waiting.track(toy.answer.remote(failed), "toy (second)")
    with pytest.raises(UserError, match="that won't do"):
        waiting.wait([taken_along], "a test")


def test_our_own_error_keeps_its_traceback(toy):
    waiting = waiter()
    with pytest.raises(ZeroDivisionError, match="in bug"):
        waiting.wait([waiting.track(toy.bug.remote(), "toy")], "a test")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_full_disk_is_told_in_words(toy, error):
    waiting = waiter()
    failed = waiting.track(toy.full_disk.remote(error), "policy rank 0 (save)")
    with pytest.raises(
        RunFailed, match=r"^policy rank 0 \(save\) failed: .*No space left on device; make room"
    ) as told:
        waiting.wait([failed], "writing a checkpoint")
    assert "Traceback" not in str(told.value)


def test_a_task_whose_process_ended_is_named(toy):
    """Ray's WorkerCrashedError, like its errors for memory and lost objects, is no error of an actor."""
    waiting = waiter()
    dead = waiting.track(dying_task.remote(), "the evaluation task")
    needs_it = waiting.track(toy.answer.remote(dead), "experience")
    with pytest.raises(ActorDied, match="the evaluation task died .*run the same command again"):
        waiting.wait([dead], "evaluation")
    with pytest.raises(ActorDied, match="a process that experience waited for died"):
        waiting.wait([needs_it], "a test")


def test_a_rank_that_only_fills_up_is_waited_for_too(toy):
    """One rollout on two ranks: the second computes it as well, and its failure is not the first one's deadline."""
    ranks = [toy, Toy.remote()]
    waiting = waiter()
    rollout = ray.put(7)
    (both,) = PolicyGroup(members("policy", ranks)).logprobs([rollout])
    waiting.wait([both], "log-probs")
    assert waiting.take_totals() == {"busy/policy_s": 1.0, "bytes/policy": 16.0}
    ray.kill(ranks[1])
    results = PolicyGroup(members("policy", ranks)).logprobs([rollout])
    with pytest.raises(ActorDied, match=r"policy actor 1 \(chunk 1\) died"):
        waiting.wait(results, "log-probs")


@pytest.mark.parametrize("in_flight", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_weights_in_flight_pass_what_is_queued_and_others_wait_behind_it(session, in_flight):
    actor, waiting = SlowGenerator.remote(), waiter()
    group = GenerationGroup(members("generation", [actor]), in_flight)
    chunks = cut_chunks(1, range(4), 1, 1)
    rollouts = group.generate(chunks)
    waiting.wait(rollouts[:1], "the first")
    waiting.wait(group.load_weights([ray.put("weights")], 1), "weights")
    versions = waiting.get(rollouts, "the others")
    assert (versions[0], versions[-1]) == (0, 1 if in_flight else 0), versions
    assert waiting.get(group.generate(chunks[:1]), "one more") == [1]
    ray.kill(actor)


def test_a_start_that_takes_too_long_names_its_own_key(session):
    half = sum(node["Resources"].get("CPU", 0.0) for node in ray.nodes()) * 0.6
    roles, waiting = {"generation": RoleConfig(cpus=half)}, waiter()
    with (
        Placement(roles, waiting, strategy="PACK", timeout_s=60.0),
        pytest.raises(Deadline, match="longer than 1 s; raise resources.start_timeout_s"),
    ):
        Placement(roles, waiting, strategy="PACK", timeout_s=1.0)


SMALL = [{"CPU": 2.0}, {"CPU": 2.0}, {"memory": 1e9}]  # the last is a head node that runs nothing


@pytest.mark.parametrize(
    ("roles", "strategy", "says"),
    [
        ({"policy": {"actors": 3, "cpus": 2}}, "PACK", "need 6 CPUs .*the cluster has 4"),
        ({"policy": {"cpus": 3}}, "PACK", "a policy actor needs 3 CPUs.*lower resources.policy.cpus"),
        ({"policy": {"cpus": 2}, "reward": {"cpus": 1}}, "STRICT_PACK", "one node has to hold all actors, 3 CPUs"),
        ({"policy": {"actors": 2}, "reward": {}}, "STRICT_SPREAD", "each of the 3 actors needs a node.*cluster has 2"),
    ],
)
def test_what_no_node_can_hold_is_refused_at_once(roles, strategy, says):
    roles = {name: RoleConfig(**role) for name, role in roles.items()}
    with pytest.raises(UserError, match=says):
        check_fits(roles, SMALL, strategy)
    check_fits(roles, [{"CPU": 6.0}] * 3, strategy)


def test_what_this_cluster_can_not_hold_is_refused_for_the_stages_to_run(session):
    recipe = tiny_recipe(resources={"generation": {"cpus": 1000}}, sft={"cpus_per_worker": 2000})
    with pytest.raises(UserError, match=r"a generation actor needs 1000 CPUs|need 1000.4 CPUs") as caught:
        check_cluster(recipe, ["ppo"])
    assert "sft" not in str(caught.value)
    with pytest.raises(UserError, match="^sft needs 2000 CPUs"):
        check_cluster(recipe, ["sft"])
    check_cluster(recipe, ["data"])


def test_a_dead_actor_is_named(session):
    waiting, actor, other = waiter(), Toy.remote(), Toy.remote()
    dead = waiting.track(actor.die.remote(), "reward actor 1 (chunk 3)")
    needs_it = waiting.track(other.answer.remote(dead), "experience")
    with pytest.raises(ActorDied, match=r"reward actor 1 \(chunk 3\) died .*go on from the last checkpoint"):
        waiting.wait([dead], "a test")
    with pytest.raises(ActorDied, match="a process that experience waited for died"):
        waiting.wait([needs_it], "a test")
    ray.kill(other)


def test_a_wait_has_a_name_and_a_deadline(session):
    heard, actor = [], Toy.remote()
    waiting = waiter(deadline_s=1.5, on_wait=lambda name, seconds, what: heard.append((name, what)))
    slow = waiting.track(actor.answer.remote(1, 60.0), "reward actor 1 (step 17, chunk 3)")
    with pytest.raises(Deadline, match=r"for reward actor 1 \(step 17, chunk 3\) during scoring.*raise the limit"):
        waiting.wait([slow], "scoring")
    assert heard and set(heard) == {("reward actor 1 (step 17, chunk 3)", "scoring")}
    ray.kill(actor)


def test_what_was_waited_for_is_let_go(toy):
    """A waiter that kept the refs would keep every rollout of the run in the object store."""
    waiting = waiter()
    result, receipt = toy.large.options(num_returns=2).remote(10)
    held = sys.getrefcount(result)
    waiting.track(result, "toy", receipt)
    assert sys.getrefcount(result) > held
    waiting.wait([result], "a test")
    assert sys.getrefcount(result) == held


def test_a_call_that_was_waited_for_goes_with_its_handle(toy):
    """At once, not when the garbage collector comes by: it holds a rollout in the object store."""
    waiting, (member,) = waiter(), members("toy", [toy])
    (handle,) = member.call("large", 10, name="toy", receipt=True)
    (second,) = member.call("answer", handle, name="toy (second)")
    waiting.wait([handle, second], "a test")
    calls = [weakref.ref(each.call) for each in (handle, second)]
    gc.disable()
    try:
        del handle, second
        assert [call() for call in calls] == [None, None] and member.calls == []
    finally:
        gc.enable()

"""The paper plan (`rlhf-ray bench scale`): its costs worked by hand, its memory held against the memory plan."""

from dataclasses import replace

import pytest

from rlhf_ray.actors.memory_plan import Precisions, phases_of
from rlhf_ray.actors.nodes import rented_nodes
from rlhf_ray.bench import scale
from rlhf_ray.bench.flops import Shape, Work
from rlhf_ray.bench.scale_model import compute_scale, show_scale
from rlhf_ray.bench.scale_plan import MODELS, Misfit, Plan, planned, recipe_of, write_config

ONE = Shape(layers=1, width=2, heads=1, vocabulary=3)  # 12 x 4 + 3 x 2 = 54 weights, 108 bytes
GPU = scale.Gpu(flop_per_s=1000, memory_per_s=100, link_per_s=54, network_per_s=27)
RATES = scale.Rates(
    training=0.5, forward=0.5, decode=0.5, launch_s=0.0, step_s=0.0, all_reduce_s=0.0, host_copy_per_s=27, store_per_s=12,
    pull_per_s=18, call_s=0.5, assemble_token_s=0.25, pinned_per_s=54, host_adam_per_s=14,
)  # fmt: skip


def plan_of(way="apart", count=8, **given):
    """A quarter of them generates, a quarter is the policy's and one the critic's, an eighth scores, one is the reference's."""
    return Plan(**{"way": way, "count": count, "split": 1, "rows": 2, "microbatch_rows": 2, "offloads": False} | given)


def test_seconds_of_generation_by_hand():
    """A token caches 2 x 2 x 1 x 2 = 8 bytes. Two rows a replica: a step reads 108 + 2 x 8 x (1 + 1) = 140 bytes at 50 a
    second, 2.8 s; its arithmetic, 2 rows x 120 FLOP at 500 a second, hides behind that."""
    work = Work(rows=4, prompt=1, response=2, epochs=1)
    assert scale.generate_seconds(ONE, work, plan_of(), GPU, RATES) == pytest.approx(2 * 2.8)
    assert scale.generate_seconds(ONE, work, plan_of("shared", 1), GPU, RATES) == pytest.approx(2 * 2 * 2.8)  # two waves of two
    slow = scale.Gpu(flop_per_s=100, memory_per_s=100)  # 240 FLOP a step at 50 a second
    assert scale.generate_seconds(ONE, work, plan_of(), slow, RATES) == pytest.approx(2 * 4.8)
    late = scale.Rates(decode=0.5, forward=0.5, launch_s=0.1, kernels=4, step_s=0.25)
    assert scale.generate_seconds(ONE, work, plan_of(), GPU, late) == pytest.approx(2 * (2.8 + 0.4 + 0.25))
    both = plan_of(split=2, rows=4)  # on two GPUs, four rows: 108 + 4 x 16 bytes at 100 a second
    assert scale.generate_seconds(ONE, work, both, GPU, RATES) == pytest.approx(2 * 1.72)


def test_seconds_of_scoring_and_update_by_hand():
    """Three tokens: 2 x 48 x 3 + 4 x 2 x 6 = 336 FLOP; two logits more: 24. Four rows: 1,344 and 1,440."""
    work = Work(rows=4, prompt=1, response=2, epochs=2)
    assert scale.score_seconds(ONE, work, plan_of(), GPU, RATES) == pytest.approx(1440 / 500)  # the reference's, on one GPU
    shared = plan_of("shared", 2)
    assert scale.score_seconds(ONE, work, shared, GPU, RATES) == pytest.approx((2 * 1440 + 2 * 1344) / 1000)
    # arithmetic 4 x 2 x 1440 / (2 x 500) = 11.52; wire: 2 epochs x 4 / 2 / 2 passes x 4 x 108 x 1/2 / 54 = 8
    assert scale.update_seconds(ONE, work, plan_of(), GPU, RATES) == pytest.approx(11.52)
    assert scale.update_seconds(ONE, work, shared, GPU, RATES) == pytest.approx(2 * 11.52)  # the critic's after it
    # on 16 ranks: 0.72 < one pass an epoch at least, 2 x (2 + 2 + 4) x 54 weights x 15/16 over 27
    many = 2 * 8 * 54 * 15 / 16 / 27
    assert scale.update_seconds(ONE, work, plan_of(count=64), GPU, RATES) == pytest.approx(many)
    # offloaded, 54 / 16 weights each and twice: 28 bytes at 14 a second, 8 at 54
    offloaded = plan_of(count=64, offloads=True)
    assert scale.update_seconds(ONE, work, offloaded, GPU, RATES) == pytest.approx(many + 2 * 54 / 16 * (2 + 8 / 54))


def test_seconds_of_turns_by_hand():
    """Two ranks: of 54 weights 27 each, 12 bytes of policy's and of critic's, and a whole model of 108, out and back at 54."""
    assert scale.turn_seconds(ONE, plan_of("shared", 2), RATES) == pytest.approx(2 * (2 * 12 * 27 + 108) / 54)
    assert scale.turn_seconds(ONE, plan_of("shared", 2, offloads=True), RATES) == pytest.approx(2 * 2)
    assert scale.turn_seconds(ONE, plan_of(), RATES) == 0


def test_seconds_of_a_sync_by_hand():
    """Gathering in float32 216/54, to the host 108/27, into the store 108/12, into the generator 108/27."""
    assert scale.store_seconds(ONE, plan_of(), GPU, RATES) == pytest.approx(4 + 4 + 9 + 4)
    shared = plan_of("shared", 16, transport="object_store")  # two nodes: over the network 216/27, and a round of pulls 108/18
    assert scale.store_seconds(ONE, shared, GPU, RATES) == pytest.approx(8 + 4 + 9 + 6 + 4)
    assert scale.sync_seconds(ONE, shared, GPU, RATES) == scale.store_seconds(ONE, shared, GPU, RATES)
    # 64 GPUs, two nodes of generators and rank 0's: two rounds
    assert scale.store_seconds(ONE, plan_of(count=64), GPU, RATES) == pytest.approx(8 + 4 + 9 + 12 + 4)


def test_seconds_of_a_broadcast_by_hand():
    """Gathered in float32, 216, sent in bfloat16, 108: over links at 54, over the network at 27."""
    assert scale.sync_seconds(ONE, plan_of(), GPU, RATES) == pytest.approx(4 + 2)
    assert scale.sync_seconds(ONE, plan_of(count=32), GPU, RATES) == pytest.approx(4 + 4)
    assert scale.sync_seconds(ONE, plan_of(count=64), GPU, RATES) == pytest.approx(8 + 4)


def test_a_step_ahead_counts_the_slower_side_alone():
    """Broadcasting is beside training: that waits for the gathering and a copy to the host, 216/54 + 108/54."""
    phases = {"generate": 11.0, "score": 1.0, "assemble": 2.0, "update": 3.0, "turns": 0.0, "sync": 6.0, "calls": 0.5}
    drawing = scale.slower_side(ONE, phases, plan_of("ahead"), GPU, RATES)
    assert drawing == {"generate": 11.0, "sync": 2.0, "calls": 0.5}  # 13.5, the other side 12.5
    training = scale.slower_side(ONE, phases | {"generate": 9.0}, plan_of("ahead"), GPU, RATES)
    assert training == {"score": 1.0, "assemble": 2.0, "update": 3.0, "sync": 6.0, "calls": 0.5}


def test_an_evaluation_is_one_process_s_by_hand():
    """Two models draw four rows, two at a time, 2.8 s a step; 2 x (1,440 + 1,344) FLOP at 500 a second."""
    work = Work(rows=4, prompt=1, response=2, epochs=1)
    assert scale.evaluation_seconds(ONE, work, plan_of(), GPU, RATES) == pytest.approx(2 * 2 * 2 * 2.8 + 5568 / 500)


def test_where_it_bends_is_the_first_phase_that_stops_shrinking():
    def row(**phases):
        return scale.Iteration(phases, phases, 0.5, 0.0)

    found = [(16, row(update=8.0, sync=1.0)), (32, row(update=4.0, sync=1.0))]
    assert scale.bend_of(found).startswith("sync first, at 32 GPUs: 1.0 s where half of them take 1.0 (20%")
    assert scale.bend_of(found[:1]) == "nowhere up to here"
    few = [(16, row(update=80.0, sync=1.0)), (32, row(update=40.0, sync=1.0))]  # a fortieth
    assert scale.bend_of(few) == "nowhere up to here"
    hidden = [(count, replace(each, slower={"update": each.phases["update"]})) for count, each in found]  # the other side's
    assert scale.bend_of(hidden) == "nowhere up to here"


def test_the_rows_of_the_paper_plan_are_the_memory_plan_s(tmp_path):
    """7 B on 8 H200: apart, a policy's rank has half of 16 bytes per weight. 70 B: no GPU holds a shared generator; on 8 GPUs two
    ranks of a policy hold 4 bytes of each weight at least, whatever else is offloaded."""
    work, nodes = Work(rows=1024, prompt=512, response=512, epochs=1), rented_nodes("1x8xH200")
    for name, shape in MODELS.items():
        write_config(tmp_path / name, shape)
    plan = planned(tmp_path / "7B", work, "apart", 8, "H200")
    assert isinstance(plan, Plan) and plan.split == 1 and not plan.offloads and plan.transport == "collective"
    recipe = recipe_of(tmp_path / "7B", work, plan)
    phases = phases_of(recipe, nodes, Precisions(stages=dict.fromkeys(recipe.trained, 2)), stages=("ppo",))
    sizes = [sum(share.size for share in shares) for phase in phases for shares in phase.gpus.values()]
    assert plan.fullest == max(sizes) < 141e9
    policy = next(shares[0].size for shares in phases[0].gpus.values() if shares[0].process == "policy 0")
    assert 8 * MODELS["7B"].weights < policy < plan.fullest + 1
    shared = planned(tmp_path / "7B", work, "shared", 8, "H200")
    assert isinstance(shared, Plan) and shared.transport == "object_store" and shared.fullest_in == "rollout"
    for way, part in (("shared", "copies of generation, 138.0 GB"), ("apart", "weights of policy, 138.0 GB")):
        found = planned(tmp_path / "70B", work, way, 8, "H200")
        assert isinstance(found, Misfit) and part in found.words and "has 141.0 GB (" in found.words


def test_every_size_and_way_has_a_row_or_what_does_not_fit(capsys):
    found = compute_scale(Work(rows=1024, prompt=512, response=512, epochs=1), gpu="h100", counts=(8, 16))
    assert [(row["model"], row["gpus"]) for row in found["rows"]] == [("7B", 8), ("7B", 16)] * 3 + [("70B", 8), ("70B", 16)] * 3
    for row in found["rows"]:
        assert "needs about" in row["misfit"] or row["seconds"] == pytest.approx(sum(row["slower"].values()))
    assert all(row["source"] and row["seconds"] for row in found["published"])
    show_scale(found, as_json=False)
    told = capsys.readouterr().out
    assert all(f"{row['model']} on {row['gpus']} {row['way']}" in told and row["misfit"] in told for row in found["rows"])

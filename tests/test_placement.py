"""Where actors stand: on paper, and on a Ray of two nodes whose GPUs are pretended."""

import os

import pytest
import ray
from shared_ray import end
from tiny import tiny_recipe

from rlhf_ray.actors.layout import Seat, lay_out, layout_words
from rlhf_ray.actors.nodes import cluster_nodes, local_gpus, local_memory
from rlhf_ray.actors.placement import Placement, check_fits
from rlhf_ray.actors.wait import Waiter
from rlhf_ray.config import GroupConfig, RoleConfig
from rlhf_ray.errors import UserError

TWO_BY_EIGHT = [{"CPU": 32.0, "GPU": 8.0}] * 2


def roles_of(**given):
    kinds = {"policy": GroupConfig, "critic": GroupConfig}
    return {name: kinds.get(name, RoleConfig).model_validate({"gpus": 1} | role) for name, role in given.items()}


#: in the recipe's own order: by that order a node would get four generators, both scorers and two ranks of the policy
WIDE = roles_of(generation={"actors": 4}, reward={}, reference={}, policy={"actors": 8}, critic={"actors": 2})


def test_ranks_of_a_group_stand_on_one_node():
    layout = lay_out(WIDE, TWO_BY_EIGHT, "PACK")
    assert layout.nodes_of("policy") == [0] * 8
    assert layout.nodes_of("critic") == [1] * 2 and layout.nodes_of("generation") == [1] * 4
    assert [len(slots) for _, slots in layout.blocks] == [8, 8]
    assert layout_words(WIDE, layout) == []


def test_a_group_that_no_node_holds_fills_one_after_the_other_and_says_so():
    layout = lay_out(roles_of(policy={"actors": 12}, generation={"actors": 4}), TWO_BY_EIGHT, "PACK")
    assert layout.nodes_of("policy") == [0] * 8 + [1] * 4 and layout.nodes_of("generation") == [1] * 4
    (words,) = layout_words(roles_of(policy={"actors": 12}), layout)
    assert words.startswith("the 12 ranks of policy stand on 2 nodes (8 + 4)")


def test_a_smaller_group_takes_what_is_left_beside_another_and_leaves_a_node_free():
    """Six and two of eight on one node, so that a generator split over eight GPUs has the other."""
    roles = roles_of(policy={"actors": 6}, critic={"actors": 2}, generation={"gpus": 8})
    layout = lay_out(roles, TWO_BY_EIGHT, "PACK")
    assert {*layout.nodes_of("policy"), *layout.nodes_of("critic")} == {0}
    assert layout.seats["generation", 0] == Seat(1, tuple(range(8)))


def test_roles_that_share_by_name_have_a_gpu_each_and_the_same_one():
    roles = roles_of(
        policy={"actors": 2, "gpus": 0.5}, generation={"actors": 2, "gpus": 0.3, "with": "policy"},
        reference={"gpus": 0.2, "with": "policy"},
    )  # fmt: skip
    seats = lay_out(roles, [{"CPU": 8.0, "GPU": 2.0}], "PACK").seats
    assert seats["policy", 0] == seats["generation", 0] == seats["reference", 0] == Seat(0, (0,))
    assert seats["policy", 1] == seats["generation", 1] == Seat(0, (1,))


def test_shares_without_a_name_go_where_ray_puts_them():
    """The GPU that has the least left for it: 0.6 and 0.4 on one, 0.5 on the next."""
    roles = roles_of(policy={"gpus": 0.6}, critic={"gpus": 0.5}, reward={"gpus": 0.4})
    seats = lay_out(roles, [{"CPU": 8.0, "GPU": 2.0}], "PACK").seats
    assert [seats[name, 0].gpus for name in ("policy", "critic", "reward")] == [(0,), (1,), (0,)]


@pytest.mark.parametrize("sections, says", [
    ({"resources": {"policy": {"actors": 2, "gpus": 0.4}}}, "lets two of its 2 ranks stand on one GPU, where NCCL ends"),
    ({"resources": {"policy": {"gpus": 2}}}, "resources.policy.gpus = 2, but each of its actors computes on one GPU"),
    ({"resources": {"policy": {"gpus": 1.5}}}, "neither a share of one GPU nor whole ones"),
    ({"resources": {"reference": {"with": "policy"}}}, "gpus = 0 is no share of a GPU"),
    ({"resources": {"reference": {"with": "policy", "gpus": 0.2}, "policy": {"gpus": 1}}}, "leaves nothing of its GPUs"),
    ({"resources": {"reference": {"with": "reference", "gpus": 0.2}}}, "the role itself"),
    ({"resources": {"reference": {"with": "policy", "gpus": 0.6}, "policy": {"gpus": 0.6}}},
     "need 1.2 of it (policy 0.6 + reference 0.6)"),
    ({"resources": {"reference": {"with": "policy", "gpus": 0.2, "actors": 2}, "policy": {"gpus": 0.6}}}, "is more than its 1"),
    ({"resources": {"reference": {"with": "reward", "gpus": 0.2}, "reward": {"with": "policy", "gpus": 0.2},
                    "policy": {"gpus": 0.5}}},
     "stands with 'policy' itself; set it to policy"),
    ({"resources": {"reference": {"with": "critic", "gpus": 0.2}}, "ppo": {"advantage": "rloo", "samples_per_prompt": 2}},
     "PPO has no critic actors"),
    ({"sft": {"workers": 2, "gpus_per_worker": 0.5, "microbatch_size": 16}}, "lets two of the 2 workers stand on one GPU"),
    ({"generation": {"engine": "vllm", "tensor_parallel": 4}, "resources": {"generation": {"gpus": 1}}},
     "set it to 4, or tensor_parallel to 1"),
    ({"generation": {"tensor_parallel": 2}}, "set generation.engine to vllm"),
    ({"generation": {"max_num_seqs": 2}}, "set generation.engine to vllm"),
    ({"resources": {"policy": {"offload_optimizer": True}}}, "set zero_stage to 1, 2 or 3"),
    ({"sft": {"zero_stage": 2, "offload_param": True}}, "set zero_stage to 3"),
])  # fmt: skip
def test_what_gpus_can_not_do_is_refused_in_words(sections, says):
    with pytest.raises(ValueError) as refused:
        tiny_recipe(**sections)
    assert says in str(refused.value)


def test_ranks_whose_gpus_are_shared_by_name_are_not_refused():
    recipe = tiny_recipe(resources={"policy": {"actors": 2, "gpus": 0.4}, "generation": {"gpus": 0.4, "with": "policy"}})
    assert recipe.resources.generation.host == "policy"
    assert type(recipe).model_validate(recipe.model_dump()) == recipe


def test_what_fits_in_sum_but_on_no_node_is_refused_at_once():
    """Three generators of two GPUs each on two nodes of three; on nodes of four and two they fit."""
    roles = roles_of(generation={"actors": 3, "gpus": 2})
    with pytest.raises(UserError, match=r"no one of them has room for generation actor 2, which needs .* 2 GPUs.* 1 GPUs and"):
        check_fits(roles, [{"CPU": 8.0, "GPU": 3.0}] * 2, "PACK")
    check_fits(roles, [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 4.0}], "PACK")


@pytest.fixture(scope="module")
def two_nodes():
    """A Ray of two nodes of eight GPUs each, as far as Ray knows."""
    from ray.cluster_utils import Cluster

    from rlhf_ray.actors.ray_start import prepare_home

    end()
    prepare_home(makes_token=True)
    options = {"num_cpus": 16, "num_gpus": 8, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    try:
        cluster.add_node(**options)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


@ray.remote
class Here:
    def gpus(self):
        return ray.get_runtime_context().get_node_id(), sorted(ray.get_gpu_ids()), os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.ray
@pytest.mark.thorough
def test_ray_puts_them_there(two_nodes):
    """The bundles of a wide layout by Ray's own table; actors that share, which say which GPU they were given; and what each node
    says that it has."""
    waiter = Waiter(120.0, "a test")
    with Placement(WIDE, waiter, strategy="PACK", timeout_s=120.0) as placement:
        tables = [ray.util.placement_group_table(group) for group in placement.groups]
        nodes = [set(table["bundles_to_node_id"].values()) for table in tables]
        assert [len(each) for each in nodes] == [1, 1] and nodes[0] != nodes[1]
        trainers = {placement._places["policy", rank][0] for rank in range(8)}
        assert len(trainers) == 1 and placement._places["critic", 0][0] not in trainers
    shared = roles_of(policy={"actors": 2, "gpus": 0.5}, generation={"actors": 2, "gpus": 0.4, "with": "policy"})
    with Placement(shared, waiter, strategy="PACK", timeout_s=120.0) as placement:
        actors = {each: Here.options(**placement.options(*each)).remote() for each in placement.layout.seats}
        found = dict(zip(actors, ray.get([actor.gpus.remote() for actor in actors.values()], timeout=240), strict=True))
    assert found["policy", 0] == found["generation", 0] and found["policy", 1] == found["generation", 1]
    assert found["policy", 0][0] == found["policy", 1][0] and found["policy", 0][1] != found["policy", 1][1]
    assert all(len(gpus) == 1 for _, gpus, _ in found.values())
    nodes = cluster_nodes()
    assert [node.amounts["GPU"] for node in nodes] == [8, 8]
    assert [(node.memory, node.gpu_memory) for node in nodes] == [(local_memory(), local_gpus())] * 2

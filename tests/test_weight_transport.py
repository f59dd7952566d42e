"""How new weights reach the generators: the choice of the way, the broadcast, and that every way moves the same bits."""

import threading
import time
from functools import partial

import pytest
import torch
from tiny import tiny_recipe, write_start

from rlhf_ray.actors.weight_transport import Place, choose_transport
from rlhf_ray.errors import RunFailed, UserError
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.training import weight_channel
from rlhf_ray.training.staged_weights import StagedWeights
from rlhf_ray.training.weight_channel import WeightChannel, cut

CPU, OTHER_CPU = Place("a", None), Place("b", None)
GPU, SECOND, THIRD = Place("a", "gpu-1"), Place("a", "gpu-2"), Place("b", "gpu-3")


@pytest.mark.parametrize(
    "setting, policy, generators, waits, way",
    [
        ("auto", CPU, [CPU, OTHER_CPU], True, "object_store"),
        ("collective", CPU, [CPU, OTHER_CPU], True, "collective"),
        ("auto", GPU, [GPU, GPU], True, "ipc"),
        ("auto", GPU, [SECOND, THIRD], True, "collective"),
        ("auto", GPU, [GPU, SECOND], True, "object_store"),  # NCCL wants a GPU for each, handles want one for all
        ("auto", GPU, [SECOND, SECOND], True, "object_store"),
        ("auto", GPU, [CPU], True, "object_store"),
        ("auto", GPU, [GPU], False, "object_store"),  # handles are of memory that the policy must not change meanwhile
        ("auto", GPU, [SECOND], False, "collective"),
        ("auto", CPU, [CPU], False, "object_store"),
        ("object_store", GPU, [GPU], True, "object_store"),
    ],
)
def test_the_way_that_places_allow(setting, policy, generators, waits, way):
    assert choose_transport(setting, policy, generators, waits=waits) == way


@pytest.mark.parametrize(
    "setting, policy, generators, says",
    [
        ("ipc", CPU, [CPU], "compute on the CPU, which allows collective or object_store; set it to auto"),
        ("ipc", GPU, [SECOND], "compute on gpu-1, gpu-2, which allows collective or object_store"),
        ("collective", GPU, [GPU], "compute on gpu-1, which allows ipc or object_store"),
        ("collective", GPU, [CPU], "compute on gpu-1, the CPU, which allows object_store"),
    ],
)
def test_a_way_that_places_do_not_allow_is_told(setting, policy, generators, says):
    with pytest.raises(UserError, match=f"weight_transport is {setting}, .*{says}"):
        choose_transport(setting, policy, generators, waits=True)


@pytest.mark.parametrize(
    "resources, ppo, says",
    [
        ({"weight_transport": "ipc"}, {"steps_ahead": 1}, "the policy would wait for them; set it to collective"),
        ({"weight_transport": "ipc"}, {}, "policy.gpus is 0 and generation.gpus is 0; give each a share"),
        ({"weight_transport": "collective", "policy": {"gpus": 1}}, {}, "reaches either GPUs or CPUs"),
        ({"weight_transport": "pigeon"}, {}, "object_store"),
    ],
)
def test_a_recipe_whose_weights_can_not_travel_so_is_refused(resources, ppo, says):
    with pytest.raises(ValueError, match=says):
        tiny_recipe(resources=resources, ppo=ppo)


def test_weights_travel_in_buckets_of_whole_ones_by_hand():
    layout = [("a", (3,)), ("b", (2, 2)), ("c", ()), ("d", (100,)), ("e", (5,)), ("f", (0, 7)), ("g", (4,))]
    # float32: 12, 16, 4, 400, 20, 0 and 16 bytes
    assert cut(layout, torch.float32, 32) == [["a", "b", "c"], ["d"], ["e", "f"], ["g"]]
    assert cut(layout, torch.bfloat16, 32) == [["a", "b", "c"], ["d"], ["e", "f", "g"]]
    assert cut([], torch.float32) == []


def members(size, timeout_s=20.0):
    """A channel of so many members, each made in a thread of its own as each has a process of its own otherwise."""
    import socket

    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    found = {}

    def join(rank):
        found[rank] = WeightChannel(
            rank=rank, size=size, address="127.0.0.1", port=port, device=torch.device("cpu"), timeout_s=timeout_s
        )

    together(*(partial(join, rank) for rank in range(size)))
    return [found[rank] for rank in range(size)]


def together(*calls):
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def together_or_raise(first, other):
    """What the first raises."""
    thread = threading.Thread(target=other)
    thread.start()
    try:
        first()
    finally:
        thread.join(30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broadcast_moves_every_bit_to_all(dtype, monkeypatch):
    monkeypatch.setattr(weight_channel, "BUCKET_BYTES", 64)
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5), "b": (), "c": (40,), "d": (0,), "e": (2, 2, 2), "f": (7,)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights["e"] = weights["e"].transpose(0, 2)  # not contiguous
    weights["f"][0], weights["f"][1] = float("nan"), float("-inf")
    layout = [(name, tuple(tensor.shape)) for name, tensor in weights.items()]
    sender, *receivers = members(3)
    got = {}
    for _ in range(2):
        together(
            lambda now=weights: got.update(sent=sender.send(now.items(), layout, dtype)),
            *(lambda one=one: got.update({one.rank: dict(one.receive(layout, dtype))}) for one in receivers),
        )
        assert got["sent"] == sum(tensor.numel() for tensor in weights.values()) * dtype.itemsize
        for one in receivers:
            assert list(got[one.rank]) == list(weights)
            for name, tensor in weights.items():
                wanted = tensor.to(dtype).contiguous()
                found = got[one.rank][name]
                assert found.dtype == dtype and found.shape == wanted.shape
                assert torch.equal(found.contiguous().view(-1).view(torch.uint8), wanted.view(-1).view(torch.uint8)), (
                    name
                )
        weights = {name: tensor + 1 for name, tensor in weights.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_staged_weights_arrive_as_they_were_while_training_goes_on(dtype, monkeypatch):
    """The policy stages, trains and stages again before a receiver has come: it waits then, for the first version to be taken."""
    monkeypatch.setattr(weight_channel, "BUCKET_BYTES", 64)
    shapes = {"a": (3, 5), "b": (), "c": (40,), "d": (0,), "e": (2, 2, 2)}
    live = {name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in shapes.items()}
    layout = [(name, tuple(tensor.shape)) for name, tensor in live.items()]
    sender, *receivers = members(3)
    staged = StagedWeights(layout, dtype, pinned=False)
    wanted, got, order, places = [], {}, [], {each.data_ptr() for each in staged.buckets}

    def train():
        for version in range(3):
            if version:
                order.append(f"stages {version}")
            assert staged.fill(live.items(), 20) == sum(map(torch.Tensor.numel, live.values())) * dtype.itemsize
            wanted.append({name: tensor.to(dtype, copy=True) for name, tensor in live.items()})
            for tensor in live.values():
                tensor += 1
            sending = threading.Thread(target=lambda: order.append(sender.send_staged(staged)))
            sending.start()
        sending.join(20)

    def receive(one):
        got[one.rank] = []
        for _ in range(3):
            arrived = {name: tensor.clone() for name, tensor in one.receive(layout, dtype)}
            got[one.rank].append(arrived)

    training = threading.Thread(target=train)
    training.start()
    while "stages 1" not in order:
        time.sleep(0.01)
    with pytest.raises(RunFailed, match="not sent to the generators within 0.01 s"):
        staged.fill(live.items(), 0.01)
    assert len(wanted) == 1, "the next version waits for this one"
    together(*(partial(receive, one) for one in receivers))
    training.join(20)
    assert {each.data_ptr() for each in staged.buckets} == places and len(wanted) == 3
    for one in receivers:
        for found, version in zip(got[one.rank], wanted, strict=True):
            assert list(found) == list(shapes)
            assert all(torch.equal(found[name], tensor) for name, tensor in version.items())


def test_weights_that_are_coming_are_copied_one_at_a_time():
    """The next weight is not asked for before the one before it is in the model; another model's are refused before any is."""
    from rlhf_ray.models.wire import WeightsInTurn, copy_weights

    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    names = list(model.state_dict())

    def coming():
        for number, name in enumerate(names):
            yield name, torch.full_like(model.state_dict()[name], number)
            assert float(model.state_dict()[name].sum()) == number * model.state_dict()[name].numel()

    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    copy_weights(model, WeightsInTurn(shapes, coming()))
    assert [float(tensor.flatten()[0]) for tensor in model.state_dict().values()] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="0.weight has shape"):
        copy_weights(model, WeightsInTurn(shapes | {"0.weight": (2, 3)}, iter(())))
    with pytest.raises(AssertionError, match="0.weight comes next, not 0.bias"):
        WeightsInTurn(shapes, coming())["0.bias"]


def test_what_arrives_in_flight_waits_in_the_host_s_memory():
    """Not in the channel's buffers: the generator copies it in when it begins its next chunk."""
    from rlhf_ray.actors.weight_transport import GenerationEnd

    class Role:
        def update_weights_in_flight(self, weights, version):
            self.taken = weights, version
            return version

    class End(GenerationEnd):
        layout, sent_as, role = [("a", (2,)), ("b", (3,))], torch.bfloat16, Role()

    sender, receiver = members(2)
    end = End()
    end.channel = receiver
    weights = {"a": torch.tensor([0.1, 2.0]), "b": torch.ones(3)}
    together(lambda: sender.send(weights.items(), end.layout, torch.bfloat16), lambda: end.receive_weights_in_flight(7))
    taken, version = end.role.taken
    assert version == 7 and taken["a"].tolist() == [0.10009765625, 2.0]  # 0.1 in 8 bits: 205 / 2048


def test_other_weights_than_agreed_are_not_sent():
    sender, receiver = members(2)
    layout = [("a", (2,))]
    with pytest.raises(AssertionError, match="not the weights of the layout"):
        together_or_raise(lambda: sender.send({"b": torch.zeros(2)}.items(), layout, torch.float32), receiver._meet)
    with pytest.raises(AssertionError, match="not the weights of the layout"):
        StagedWeights(layout, torch.float32, pinned=False).fill({"a": torch.zeros(1)}.items(), 1)


def test_a_sender_that_does_not_come_is_told_in_words():
    sender, receiver = members(2, timeout_s=1.0)
    with pytest.raises(
        RunFailed, match=r"did not move weights within 1 s \(member 1 .*weight_transport to object_store"
    ):
        list(receiver.receive([("a", (2,))], torch.float32))


def test_members_that_do_not_meet_are_told_in_words():
    import socket

    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    with pytest.raises(RunFailed, match="did not meet within 1 s"):
        WeightChannel(rank=0, size=2, address="127.0.0.1", port=port, device=torch.device("cpu"), timeout_s=1.0)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, stage, ppo",
    [
        pytest.param(2, 3, {}, id="ZeRO-3"),
        pytest.param(1, 0, {}, id="one rank"),
        pytest.param(1, 0, {"lora": {"rank": 4}}, id="LoRA"),
    ],
)
def test_a_broadcast_is_as_good_as_the_object_store(tmp_path, ranks, stage, ppo):
    """Whole runs over actors: the same final weights, bit for bit, by either way (in tests/test_ppo_ray.py: to rounding)."""
    from safetensors.torch import load_file

    from rlhf_ray.actors.ppo_stage import run_ppo
    from rlhf_ray.actors.session import ray_session

    weights = {}
    with ray_session(None):
        for way in ("object_store", "collective"):
            policy = {"actors": ranks, "zero_stage": stage, "threads": 1, "cpus": 0.1}
            small = {"threads": 1, "cpus": 0.1}
            recipe = tiny_recipe(
                ppo={"steps": 2, "checkpoint_every": 2, "eval_every": 2} | ppo,
                resources={"weight_transport": way, "policy": policy, "generation": small | {"actors": 2},
                           "critic": small, "reward": small, "reference": small},
            )  # fmt: skip
            folder = write_start(recipe, RunFolder(tmp_path / way))
            run_ppo(recipe, folder, lambda event: None)
            weights[way] = load_file(folder.stage("ppo").model / "model.safetensors")
    assert weights["object_store"].keys() == weights["collective"].keys()
    for name, tensor in weights["object_store"].items():
        assert torch.equal(tensor, weights["collective"][name]), name


@pytest.mark.gpu
def test_a_tensor_of_another_process_is_opened_on_the_same_gpu():
    """The other process changes the numbers, and this one sees it: the memory is the same."""
    import torch.multiprocessing as processes

    context = processes.get_context("spawn")
    queue, turn = context.Queue(), context.Barrier(2, timeout=60)
    child = context.Process(target=_share, args=(queue, turn))
    child.start()
    handle = queue.get(timeout=60)
    opened = handle.open()
    assert opened.dtype == torch.bfloat16 and opened.tolist() == [0.0, 1.0, 2.0, 3.0]
    turn.wait()
    turn.wait()
    assert opened.tolist() == [10.0, 11.0, 12.0, 13.0]
    del opened
    turn.wait()
    child.join(60)
    assert child.exitcode == 0


def _share(queue, turn):
    from rlhf_ray.models.shared_gpu import share_weights

    kept, handles = share_weights([("a", torch.arange(4.0, device="cuda"))], torch.bfloat16)
    queue.put(handles["a"])
    turn.wait()
    kept["a"] += 10
    torch.cuda.synchronize()
    turn.wait()
    turn.wait()


@pytest.mark.gpu
@pytest.mark.ray
def test_handles_are_as_good_as_the_object_store(tmp_path):
    from rlhf_ray.actors.ppo_stage import run_ppo
    from rlhf_ray.actors.session import ray_session
    from rlhf_ray.runs.metrics import read_metrics

    share = {"gpus": 0.2, "cpus": 0.1}
    with ray_session(None):
        for way in ("object_store", "ipc"):
            resources = dict.fromkeys(("generation", "reward", "reference", "policy", "critic"), share)
            recipe = tiny_recipe(
                ppo={"steps": 3, "learning_rate": 0.01}, resources=resources | {"weight_transport": way}
            )
            folder = write_start(recipe, RunFolder(tmp_path / way))
            run_ppo(recipe, folder, lambda event: None)
            rows = [row for row in read_metrics(folder.stage("ppo").metrics) if "policy/mismatch_max" in row]
            assert len(rows) == 3 and all(row["policy/mismatch_max"] < 1e-3 for row in rows), way

"""What a version is, and what training and server compute for it: expected values are transformers' own."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from served_app import LIMITS, save_tiny
from swapping import TOKENS, Asked, greedy, variant
from transformers import AutoModelForCausalLM

from rlhf_ray.errors import UserError
from rlhf_ray.publish.checked_rows import check_rows, read_rows
from rlhf_ray.publish.client import Refused, dropped_if_refused, kept_copy
from rlhf_ray.publish.version import ROWS_FILE, version_id, version_of
from rlhf_ray.serving.config import AppConfig, EngineOptions
from rlhf_ray.serving.front import Front
from rlhf_ray.serving.held import HeldVersions
from rlhf_ray.serving.loading import load
from rlhf_ray.serving.publication import Publisher
from rlhf_ray.serving.relay import NOT_HERE, pieces
from rlhf_ray.serving.versions import VersionTable


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "model")


def test_a_version_is_named_by_what_its_files_hold(folder, tmp_path):
    copy = kept_copy(folder, tmp_path)
    assert copy.id == version_id(folder) == version_id(copy.folder) and len(copy.id) == 12
    (tmp_path / copy.id / "README.md").write_text("another card")
    copy.check()
    config = tmp_path / copy.id / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(UserError, match="have changed"):
        copy.check()


def test_training_log_probs_are_transformers_own_and_a_changed_weight_is_found(folder, tmp_path):
    copy = kept_copy(folder, tmp_path)
    rows = read_rows(tmp_path / copy.id)
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    with torch.no_grad():
        logprobs = model(torch.tensor(rows.ids)).logits.log_softmax(-1)
        expected = logprobs[:, :-1].gather(-1, torch.tensor(rows.ids)[:, 1:, None])[..., 0]
        np.testing.assert_allclose(rows.logprobs, expected, atol=1e-5)
        assert check_rows(rows, expected.tolist(), "float32") < 1e-5
        model.transformer.h[0].mlp.c_fc.weight *= 1.05
        moved = model(torch.tensor(rows.ids)).logits.log_softmax(-1)[:, :-1].gather(-1, torch.tensor(rows.ids)[:, 1:, None])[..., 0]
    with pytest.raises(UserError, match="differ from training's"):
        check_rows(rows, moved.tolist(), "float32")


# -- replicas in this process: all but Serve


class Replica:
    """A replica without Serve between: it is told what to hold, and answers as the one of `serving.deployment`."""

    back_in_s = 5.0

    def __init__(self, name, folder):
        self.name, self.models, self.up, self.ongoing = name, ("m",), True, 0
        self.held = HeldVersions(
            EngineOptions(model=str(folder), precision="float32"), {"m": AppConfig(name="m", limits=LIMITS)}
        )

    async def answer(self, request):
        found = self.held.app(request.model, request.version)
        if found is None:
            yield [NOT_HERE, [], b"", False]
            return
        self.ongoing += 1
        try:
            async for piece in pieces(found[0], request):
                if len(piece) > 3:  # the first one
                    piece[1].append([b"x-model-version", found[1].encode()])
                yield piece
        finally:
            self.ongoing -= 1

    async def stats(self):
        return self.held.stats()

    async def states(self):
        return self.held.states()


async def swapped(folder, versions, clients):
    """Publish the versions one after the other while clients ask. -> the publisher and the replicas, at the end"""
    replicas = [Replica("one", folder), Replica("two", folder)]
    table = VersionTable(version_of(folder))
    loop = asyncio.get_running_loop()

    def deploy(wanted):
        for replica in replicas:
            asyncio.run_coroutine_threadsafe(replica.held.hold(wanted), loop).result(60)

    for replica in replicas:
        await replica.held.hold({"m": [table.stable]})
    publisher = Publisher({"m": table}, replicas, deploy)
    front = Front(replicas, None, {"m": table})
    front.listeners.append(publisher.ended)
    watching = asyncio.ensure_future(publisher.watch())
    transport = httpx.ASGITransport(front, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=300) as client:

        async def ask(one):
            while not one.over:
                one.take(await client.post("/v1/completions", json=one.body()))

        asking = [asyncio.ensure_future(ask(one)) for one in clients]
        for version in versions:
            seen = sum(one.answers for one in clients)
            while sum(one.answers for one in clients) < seen + 2 * len(clients):
                await asyncio.sleep(0.01)
            state = await publisher.publish("m", version, 1.0, watch_s=0.0)
            assert state["history"][-1]["logprob_gap"] < 1e-4
        while table.stable != versions[-1] or any(one.versions[-1:] != [versions[-1].id] for one in clients):
            await asyncio.sleep(0.01)
        while any(len(replica.held.states()["m"]) > 1 for replica in replicas):  # what is not needed goes
            await asyncio.sleep(0.01)
        for one in clients:
            one.over = True
        await asyncio.gather(*asking)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    return publisher, replicas


def test_three_swaps_drop_nothing_and_mix_nothing(folder, tmp_path):
    versions = [variant(folder, tmp_path / f"weights_{seed}", seed) for seed in range(3)]
    expected = {version_id(folder): greedy(folder)} | {version.id: greedy(version.folder) for version in versions}
    assert len({json.dumps(texts) for texts in expected.values()}) == 4
    clients = [Asked(expected, number) for number in range(3)]
    publisher, replicas = asyncio.run(swapped(folder, versions, clients))
    assert [wrong for one in clients for wrong in one.wrong] == []
    order = list(expected)
    for one in clients:  # none goes back
        places = [order.index(version) for version in one.versions]
        assert places == sorted(places) and {0, 3} <= set(places)
    assert publisher.state("m")["earlier"] == order[:-1]
    for replica in replicas:
        assert [list(held) for held in replica.held.states().values()] == [[versions[-1].id]]
    tokens = sum(replica.held.stats()["tokens"] for replica in replicas)
    assert tokens == TOKENS * sum(one.answers for one in clients)  # of the versions that are gone, too


def test_a_version_that_training_knows_otherwise_is_refused_by_the_replica(folder, tmp_path):
    damaged, replica = variant(folder, tmp_path / "damaged", 9), Replica("one", folder)
    rows = tmp_path / damaged.id / ROWS_FILE
    told = json.loads(rows.read_text())
    told["logprobs"][0][3] -= 1.0  # of 4 x 31: a mean gap of 0.008
    rows.write_text(json.dumps(told))

    async def hold():
        await replica.held.hold({"m": [version_of(folder)]})
        await replica.held.hold({"m": [version_of(folder), damaged]})
        while (state := replica.held.states()["m"][damaged.id])["state"] == "loading":
            await asyncio.sleep(0.01)
        return state, replica.held.app("m", damaged.id)

    state, app = asyncio.run(hold())
    assert state["state"] == "failed" and "differ from training's by 0.008" in state["why"] and app is None
    assert replica.held.healthy


def test_a_model_in_16_bits_is_loaded_beside_others_without_changing_what_they_compute(folder, monkeypatch):
    """transformers sets torch's default dtype, which all threads share, while it builds a model in 16 bits."""
    told, real = [], torch.set_default_dtype
    options = EngineOptions(model=str(folder), precision="bfloat16")
    alone = load(options, LIMITS)[0].engine.model
    monkeypatch.setattr(torch, "set_default_dtype", lambda dtype: (told.append(dtype), real(dtype)))
    beside = load(options, LIMITS, beside=True)[0].engine.model
    assert set(told) <= {torch.float32} and torch.get_default_dtype() == torch.float32
    pairs = [*zip(alone.named_parameters(), beside.named_parameters(), strict=True)]
    assert {one.dtype for (_, one), _ in pairs} == {torch.bfloat16}
    assert all(name == other and torch.equal(one, two) for (name, one), (other, two) in pairs)


def test_the_copy_of_a_version_that_a_server_refuses_goes_again(folder, tmp_path):
    def told(error, since):
        version = kept_copy(folder, tmp_path / "published")
        with pytest.raises(UserError), dropped_if_refused(Path(version.folder), since):
            raise error
        return (tmp_path / "published").exists()

    (tmp_path / "published").mkdir()
    since = time.time() - 1  # file systems keep coarse times
    assert told(UserError("did not answer"), since), "a server that is slow may take it yet"
    assert told(Refused("no"), time.time() + 1), "an older copy may be held"
    assert not told(Refused("no"), since)

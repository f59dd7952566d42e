"""/v1/values: the critic of a run behind the server's own interface. Expected values by transformers' GPT-2 and a head by hand."""

import asyncio
from types import SimpleNamespace

import httpx
import pytest
import torch
from checkpoints import write_rank
from tiny import tiny_recipe, write_start
from transformers import AutoModel

from rlhf_ray.ppo import checkpoint
from rlhf_ray.ppo.loop import LoopState
from rlhf_ray.runs.resume import write_recipe
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.serving.app import build_routes
from rlhf_ray.serving.config import AppConfig
from rlhf_ray.serving.critic_values import CriticRunner, keeps_critic


@pytest.fixture
def run(tmp_path):
    """(run folder, the body that the checkpoint holds, weight and bias of its head)."""
    recipe = tiny_recipe(ppo={"critic_init": "sft"})
    folder = write_start(recipe, RunFolder(tmp_path / "run"))
    write_recipe(recipe, folder.recipe)
    body = AutoModel.from_pretrained(folder.stage("sft").model).eval()
    with torch.no_grad():
        body.wpe.weight += 0.3
    head, bias = torch.linspace(-1, 1, body.config.hidden_size)[None], torch.tensor([0.25])
    named = {f"backbone.{name}": weight for name, weight in body.named_parameters()}
    named |= {"value_head.weight": head, "value_head.bias": bias}
    temporary = checkpoint.temporary_folder(folder.stage("ppo").checkpoints, 3)
    temporary.mkdir(parents=True)
    state = [(f"weight/model.{name}", weight.detach()) for name, weight in named.items()]
    digests = write_rank(temporary, "critic", 0, 1, state, steps_taken=6)
    told = LoopState(step=3, kl_coef=0.05).to_json()
    checkpoint.publish(folder.stage("ppo").checkpoints, 3, told, keep=1, digests=digests)
    return folder, body, head, bias


def post(body, critic):
    app = build_routes(None, SimpleNamespace(positions=8, chat_is_plain=True), AppConfig(name="ppo"), critic)

    async def talk():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post("/v1/values", json=body, timeout=60)

    return asyncio.run(talk())


def test_values_are_those_of_the_checkpoints_critic(run):
    folder, body, head, bias = run
    assert keeps_critic(folder.path)
    ids = [5, 9, 2, 2, 7]
    with torch.no_grad():
        hidden = body(torch.tensor([ids])).last_hidden_state[0]
    expected = [float((line * head[0]).sum() + bias[0]) for line in hidden]
    critic = CriticRunner(str(folder.path))
    answer = post({"model": "ppo", "prompt": ids}, critic)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert (told["object"], told["model"], told["step"]) == ("values", "ppo", 3)
    assert told["values"] == pytest.approx(expected, abs=1e-5)
    # A value depends on nothing behind it.
    assert post({"model": "ppo", "prompt": ids[:2]}, critic).json()["values"] == pytest.approx(expected[:2], abs=1e-5)
    refused = post({"model": "ppo", "prompt": [10**6]}, critic)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt"


def test_without_a_critic_there_are_no_values(run, tmp_path):
    folder = run[0]
    answers = [post({"model": "ppo", "prompt": [1]}, None)]
    for file in folder.stage("ppo").checkpoints.rglob("critic-*"):
        file.unlink()
    assert not keeps_critic(folder.path) and not keeps_critic(tmp_path / "none")
    answers.append(post({"model": "ppo", "prompt": [1]}, CriticRunner(str(folder.path))))
    for answer in answers:
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "no_critic"
    assert post({"model": "ppo", "prompt": []}, None).status_code == 400
    assert post({"model": "other", "prompt": [1]}, None).json()["error"]["code"] == "model_not_found"

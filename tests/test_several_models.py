"""Several models at one endpoint: each request goes to the one that it names."""

import asyncio
import json

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from served_app import LIMITS, save_tiny
from transformers import AutoModelForCausalLM

from rlhf_ray.config.sampling_params import SamplingParams
from rlhf_ray.errors import UserError
from rlhf_ray.serving import server_ray
from rlhf_ray.serving.app import build_routes
from rlhf_ray.serving.config import AppConfig, EngineOptions
from rlhf_ray.serving.deployment import build_application
from rlhf_ray.serving.front import Front
from rlhf_ray.serving.launch import serve
from rlhf_ray.serving.loading import Bases, load
from rlhf_ray.serving.page.options import PageOptions
from rlhf_ray.serving.relay import pieces
from rlhf_ray.serving.served import named_folders, served_models

PROMPT = list(range(5, 25))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, and an adapter on it that changes what it says; written by peft itself, which knows the model by its folder."""
    base = save_tiny(tmp_path_factory.mktemp("models") / "base")
    adapter = base.parent / "tuned"
    torch.manual_seed(3)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    )
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(adapter)
    return base, adapter


def greedy(model):
    """transformers' own, of the model given."""
    ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    return ids[0, len(PROMPT) :].tolist()


@pytest.fixture(scope="module")
def expected(folders):
    from peft import PeftModel

    base, adapter = folders
    plain = greedy(AutoModelForCausalLM.from_pretrained(base))
    tuned = greedy(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    assert plain != tuned
    return {"base": plain, "tuned": tuned}


class AppLink:
    """A replica's app, without Ray between."""

    back_in_s = 5.0

    def __init__(self, model, options, others, bases):
        self.name, self.models, self.up, self.ongoing = f"replica-{model}", (model,), True, 0
        self.runner, reader = load(options, LIMITS, bases)
        self.app = build_routes(self.runner, reader, AppConfig(name=model, others=others, limits=LIMITS))

    async def answer(self, request):
        async for piece in pieces(self.app, request):
            yield piece

    async def stats(self):
        return {"steps": 1}


@pytest.fixture(scope="module")
def links(folders):
    base, adapter = map(str, folders)
    bases = Bases()
    return [
        AppLink("base", EngineOptions(model=base, precision="float32"), ("tuned",), bases),
        AppLink("tuned", EngineOptions(model=base, adapter=adapter, precision="float32"), ("base",), bases),
    ]


def talk(links, *requests):
    async def inside():
        transport = httpx.ASGITransport(Front(links), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [await client.request(*one, timeout=60, **more) for *one, more in requests]

    return asyncio.run(inside())


def completion(model):
    return ["POST", "/v1/completions", {"json": {
        "model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "logprobs": 0,
    }}]  # fmt: skip


def test_each_request_is_answered_by_the_model_that_it_names(folders, links, expected):
    from rlhf_ray.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folders[0])
    for model, answer in zip(
        ("base", "tuned", "base"), talk(links, *map(completion, ("base", "tuned", "base"))), strict=True
    ):
        body = answer.json()
        assert answer.status_code == 200 and body["model"] == model
        assert body["choices"][0]["text"] == tokenizer.decode(expected[model], skip_special_tokens=False)


def test_an_adapter_has_the_models_weights_in_common_and_leaves_them_as_they_were(folders, links):
    base, tuned = (link.runner.engine.model for link in links)
    own = {parameter.data_ptr() for parameter in base.parameters()}
    adapters = {name: parameter for name, parameter in tuned.named_parameters() if parameter.data_ptr() not in own}
    assert own <= {parameter.data_ptr() for parameter in tuned.parameters()}
    assert len(adapters) == 2 * 2 * 2 and all("lora_" in name for name in adapters)  # A and B, of two layers' two products
    written = AutoModelForCausalLM.from_pretrained(folders[0]).state_dict()
    assert all(torch.equal(tensor, written[name]) for name, tensor in base.state_dict().items())


def test_an_adapter_without_its_model_beside_it_loads_one_and_several_share_it(folders, expected):
    base, adapter = map(str, folders)
    bases = Bases()
    options = EngineOptions(model=base, adapter=adapter, precision="float32")
    one, two = (load(options, LIMITS, bases)[0].engine for _ in range(2))
    shared = {parameter.data_ptr() for parameter in one.model.parameters()}
    assert sum(parameter.data_ptr() not in shared for parameter in two.model.parameters()) == 8
    drawn = two.generate([PROMPT], [0], SamplingParams(max_new_tokens=12, min_new_tokens=12, temperature=0.0))
    assert drawn[0].response_ids.tolist() == expected["tuned"]


def test_models_are_listed_and_an_unknown_one_is_told_all_of_them(links):
    listed, one, missing, unknown = talk(
        links, ["GET", "/v1/models", {}], ["GET", "/v1/models/tuned", {}], ["GET", "/v1/models/x", {}], completion("x")
    )
    assert [card["id"] for card in listed.json()["data"]] == ["base", "tuned"]
    assert one.json()["id"] == "tuned"
    for refused in (missing, unknown):
        assert refused.status_code == 404 and "this server has 'base', 'tuned'" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    "body", [b"", b"[1]", b"{}", b'{"model": ["tuned"]}', b'{"model": 3}', b"[" * 100_000, b"\xff"]
)
def test_a_body_that_names_no_model_is_refused_and_not_an_error(links, body):
    (answer,) = talk(
        links, ["POST", "/v1/completions", {"content": body, "headers": {"content-type": "application/json"}}]
    )
    assert 400 <= answer.status_code < 500 and answer.json()["error"]["message"]


def test_one_model_without_a_replica_costs_the_others_nothing(links):
    links[0].up = False
    try:
        health, listed, other, gone, version, unknown = talk(
            links, ["GET", "/health", {}], ["GET", "/v1/models", {}], completion("tuned"), completion("base"),
            ["GET", "/version", {}], completion("x"),
        )  # fmt: skip
    finally:
        links[0].up = True
    assert (health.status_code, version.status_code, unknown.status_code) == (200, 200, 404)
    assert [card["id"] for card in listed.json()["data"]] == ["tuned"]
    assert (other.status_code, gone.status_code) == (200, 503) and "model base" in gone.json()["error"]["message"]


# -- which models


def test_names_and_folders():
    assert named_folders(["a=x/y", "b=c=d"]) == {"a": "x/y", "b": "c=d"}
    for wrong in ("a", "=x", "a=", " =x", "a b=x", "a\nb=x", " a=x"):
        with pytest.raises(UserError, match="is not NAME=PATH"):
            named_folders([wrong])
    with pytest.raises(UserError, match="names 'a' twice"):
        named_folders(["a=x", "a=y"])


def test_an_adapter_is_read_on_the_first_model_or_on_the_one_that_it_names(folders):
    base, adapter = folders
    first, tuned = served_models(base, None, {"t": adapter}, engine=None, gpus=0)
    assert (first.name, first.folder, first.adapter) == ("base", base, None)
    assert (tuned.name, tuned.folder, tuned.adapter) == ("t", base, adapter)
    (alone,) = served_models(adapter, None, {}, engine=None, gpus=0)
    assert (alone.name, alone.folder, alone.adapter) == ("tuned", base, adapter)
    with pytest.raises(UserError, match="'base' is served already"):
        served_models(base, None, {"base": adapter}, engine=None, gpus=0)


def test_an_adapter_of_a_model_that_is_not_here_says_how_to_serve_it(folders, tmp_path):
    lone = tmp_path / "lone"
    lone.mkdir()
    for file in folders[1].iterdir():
        (lone / file.name).write_bytes(file.read_bytes())
    config = json.loads((lone / "adapter_config.json").read_text())
    (lone / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "somebody/else"}))
    with pytest.raises(
        UserError, match=r"for somebody/else, which is no folder here.*rlhf-ray serve MODEL --model lone="
    ):
        served_models(lone, None, {}, engine=None, gpus=0)


def test_an_adapter_of_another_model_is_told(folders, tmp_path):
    other = tmp_path / "other"
    tuned = get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), LoraConfig(r=2, target_modules=["0"]))
    tuned.save_pretrained(other)
    with pytest.raises(UserError, match="does not fit the model"):
        load(EngineOptions(model=str(folders[0]), adapter=str(other), precision="float32"), LIMITS)


def copy_of(folder, target):
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target, target / "adapter_model.safetensors"


@pytest.mark.parametrize("fault, told", [
    ("a layer more", "2 of its weights are on one side only"), ("no lora_B", "weights are on one side only"),
    ("not finite", "not finite"), ("cut file", "or is damaged"),
])  # fmt: skip
def test_what_peft_loads_in_silence_is_refused(folders, tmp_path, fault, told):
    from safetensors.torch import load_file, save_file

    folder, file = copy_of(folders[1], tmp_path / "bad")
    tensors = load_file(file)
    first = sorted(tensors)[0]
    if fault == "a layer more":
        for name in sorted(tensors)[:2]:
            tensors[name.replace(".h.0.", ".h.7.")] = tensors[name].clone()
    elif fault == "no lora_B":
        tensors = {name: tensor for name, tensor in tensors.items() if "lora_B" not in name}
    else:
        tensors[first][0, 0] = torch.nan
    save_file(tensors, file)
    if fault == "cut file":
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=told):
        load(EngineOptions(model=str(folders[0]), adapter=str(folder), precision="float32"), LIMITS)


@pytest.mark.parametrize("config", ["[]", "{", '{"peft_type": "PROMPT_TUNING", "r": 2}', '{"peft_type": "LORA", "r": "x"}'])
def test_a_config_that_is_no_low_rank_adapters_is_told(folders, tmp_path, config):
    folder, _ = copy_of(folders[1], tmp_path / "bad")
    (folder / "adapter_config.json").write_text(config)
    with pytest.raises(UserError, match="no low-rank adapter|can't be read"):
        served_models(folders[0], None, {"bad": folder}, engine=None, gpus=0)


def test_another_base_than_the_adapter_names_is_noted(folders, tmp_path):
    folder, _ = copy_of(folders[1], tmp_path / "t")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "somebody/else"}))
    _, tuned = served_models(folders[0], None, {"t": folder}, engine=None, gpus=0)
    assert "is for somebody/else; it is read on" in tuned.note
    _, right = served_models(folders[0], None, {"t": folders[1]}, engine=None, gpus=0)
    assert right.note is None


def test_a_results_folder_with_an_adapter_says_how_to_serve_it(folders, tmp_path):
    (tmp_path / "results").mkdir()
    copy_of(folders[1], tmp_path / "results" / "policy")
    with pytest.raises(UserError, match=r"holds an adapter and no model.*rlhf-ray serve MODEL --model results="):
        served_models(tmp_path / "results", None, {}, engine=None, gpus=0)


@pytest.mark.ray
@pytest.mark.thorough
def test_on_ray_both_are_served_and_compared_on_the_page(folders, expected, tmp_path, monkeypatch):
    for name, value in server_ray._LOOPBACK_SETTINGS.items():  # a server sets these for its process; later tests need others
        monkeypatch.setenv(name, value)
    base, adapter = folders
    page = PageOptions(votes=str(tmp_path / "votes.db"))
    server = serve(base, more_models={"tuned": adapter}, port=0, precision="float32", page=page, block=False)
    try:
        assert "Serving 'base' and 'tuned' at" in server.announcement()
        answers = [httpx.post(f"{server.url}{path}", timeout=60, **more) for _, path, more in map(completion, expected)]
        assert [answer.json()["model"] for answer in answers] == list(expected)
        assert answers[0].json()["choices"][0]["text"] != answers[1].json()["choices"][0]["text"]
        stats = httpx.get(f"{server.url}/stats", timeout=60).json()
        assert [one["model"] for one in stats["replicas"]] == ["base, tuned"]  # in one replica, with one set of weights
        asked = {"rater": "ann", "prompt": "the cat", "max_tokens": 8}
        shown = httpx.post(f"{server.url}/page/comparisons", json=asked, timeout=60).json()
        vote = {"rater": "ann", "comparison": shown["comparison"], "key": "k", "choice": "left"}
        told = httpx.post(f"{server.url}/page/votes", json=vote, timeout=60).json()
        assert told["new"] and {told["left"]["model"], told["right"]["model"]} == {"base", "tuned"}
    finally:
        server.close()


def test_a_serve_config_names_further_models(folders, monkeypatch):
    monkeypatch.setenv("RLHF_RAY_API_KEY", "secret")
    base, adapter = map(str, folders)
    application = build_application({"model": base, "models": {"tuned": adapter}})
    assert application._bound_deployment.init_args[2] == {"replica-1": ["base", "tuned"]}

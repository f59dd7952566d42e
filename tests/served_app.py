"""The HTTP app on a tiny random model without Ray, for several test files."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest
import torch

from rlhf_ray.config import FromScratch, ModelConfig
from rlhf_ray.models.load import build_causal_lm
from rlhf_ray.models.save import save_model
from rlhf_ray.models.tokenizer import train_tokenizer
from rlhf_ray.serving.app import build_app
from rlhf_ray.serving.config import AppConfig, EngineOptions, Limits
from rlhf_ray.serving.loading import load

POSITIONS = 96
TEXTS = ["the cat sat on the mat and the dog sat on the log, then they both slept. café naïve 漢字 🙂 "] * 8
LIMITS = Limits(max_rows=16, max_waiting_rows=16, max_n=8, max_prompts=4, max_body_bytes=20_000)


def save_tiny(path, positions=POSITIONS):
    """A GPT-2 with random weights whose distributions are not flat."""
    tokenizer = train_tokenizer(TEXTS, 320)
    shape = FromScratch(layers=2, width=32, heads=2, positions=positions, vocab_size=320)
    model = build_causal_lm(ModelConfig(from_scratch=shape), tokenizer, seed=0)
    with torch.no_grad():
        model.transformer.wte.weight *= 5
    return save_model(model, tokenizer, path, "tiny")


def start(folder, limits=LIMITS):
    """-> (runner, reader)"""
    return load(EngineOptions(model=str(folder), precision="float32"), limits)


def transport(served, **settings):
    app = build_app(*served, AppConfig(**{"name": "tiny", "limits": LIMITS} | settings))
    return httpx.ASGITransport(app=app, raise_app_exceptions=False)


def ask(served, talk, **settings):
    """Run talk(client) with OpenAI's client on an app of its own."""

    async def run():
        async with openai.AsyncOpenAI(
            base_url="http://test/v1",
            api_key=settings.get("api_key", "none"),
            max_retries=0,
            http_client=httpx.AsyncClient(transport=transport(served, **settings)),
        ) as client:
            return await talk(client)

    return asyncio.run(run())


def send(served, method, path, *, settings=None, **kwargs):
    async def run():
        async with httpx.AsyncClient(transport=transport(served, **settings or {}), base_url="http://test") as client:
            return await client.request(method, path, **kwargs)

    return asyncio.run(run())


@pytest.fixture(scope="module", name="folder")
def tiny_folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("run") / "model")


@pytest.fixture(scope="module", name="served")
def served_tiny(folder):
    """(runner, reader) of the tiny model, in this process."""
    runner, reader = start(folder)
    yield runner, reader
    runner.close()

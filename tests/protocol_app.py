"""The HTTP app on a real tiny engine, without Ray: fixtures of the tests of OpenAI's protocol."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import served_app
from served_app import save_tiny, start

LIMITS = dataclasses.replace(served_app.LIMITS, max_tokens=80)


@pytest.fixture(name="folder", scope="module")
def protocol_folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("run") / "model")


@pytest.fixture(name="served", scope="module")
def protocol_served(folder):
    runner, reader = start(folder, LIMITS)
    yield runner, reader
    runner.close()


transport, ask = partial(served_app.transport, limits=LIMITS), partial(served_app.ask, limits=LIMITS)


def send(*request, settings=None, **kwargs):
    return served_app.send(*request, settings={"limits": LIMITS} | (settings or {}), **kwargs)

"""The page on a real HTTP server of this process, over models whose answers are scripted: no weights, no Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import socket
import ssl
import time

import httpx
import numpy as np

from rlhf_ray.config.sampling_params import Completion, TokenEvent, TokenLogprobs
from rlhf_ray.models.tokenizer import train_tokenizer
from rlhf_ray.publish.version import Version
from rlhf_ray.serving.app import build_routes
from rlhf_ray.serving.config import AppConfig, Limits
from rlhf_ray.serving.control import versions_page
from rlhf_ray.serving.front import Front
from rlhf_ray.serving.guard import guarded
from rlhf_ray.serving.http_limits import HttpLimits
from rlhf_ray.serving.http_server import HttpServer
from rlhf_ray.serving.page.build import PageParts, build_page, is_of_page
from rlhf_ray.serving.page.options import PageOptions
from rlhf_ray.serving.prompts import PromptReader
from rlhf_ray.serving.publication import Publisher
from rlhf_ray.serving.relay import pieces
from rlhf_ray.serving.runner import EngineRunner
from rlhf_ray.serving.versions import VersionTable

POSITIONS = 4000
WITHOUT_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # else each request reads all certificates of this machine, for 50 ms
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
ROSES = (
    "Roses want sun, water and patience. Plant them where they get six hours of light, dig in compost, and water at the root, "
    "never on the leaves.\n\nIn March cut back to an outward-facing bud. Feed once when the leaves open, and again after the first "
    "bloom."
)
PIANO = "Begin with ten minutes a day.\n\n1. Find middle C.\n2. Play five notes with five fingers.\n3. Sing along."
SCRIPT = {
    "sft": {
        "roses": "Roses are nice flowers. You can grow them in a garden. They like water. They like water.",
        "piano": "You need a piano.",
    },
    "ppo": {"roses": ROSES, "piano": PIANO},
}  # fmt: skip
PROMPTS = ["How do I grow roses?", "How can I learn the piano as a grown-up?"]


class ScriptedEngine:
    """A continuous engine that writes what the script says, one token a step. Every answer ends with its seed's last digit."""

    max_length, vocab_size = POSITIONS, 320

    def __init__(self, name, tokenizer, step_s):
        self.name, self.tokenizer, self.step_s = name, tokenizer, step_s
        self.rows, self.numbers = {}, itertools.count()

    def submit(self, prompt_ids, seed, params, rules=None):
        text = self.tokenizer.decode(prompt_ids)
        said = next((answer for word, answer in SCRIPT[self.name].items() if word in text), f"I am here ({seed % 10}).")
        if "<script>" in text:
            said = "<img src=x onerror=\"document.title='broken'\"><b>bold</b>"
        ids = [*self.tokenizer.encode(said, add_special_tokens=False), self.tokenizer.eos_token_id]
        number = next(self.numbers)
        self.rows[number] = (ids[: params.max_new_tokens], [], params.max_new_tokens < len(ids))
        return number

    def score(self, prompt_ids, alternatives):
        """-0.25 per place for one model and -0.5 for the other, so that sums can be told by hand."""
        each = -0.25 if self.name == "ppo" else -0.5
        return [
            None,
            *(TokenLogprobs(logprob=each * (1 + place % 7), top=()) for place, _ in enumerate(prompt_ids[1:])),
        ]

    def step(self):
        time.sleep(self.step_s)
        events = []
        for number, (left, done, cut) in list(self.rows.items()):
            done.append(left.pop(0))
            completion = None
            if not left:
                reason = "length" if cut else "eos"
                logprobs = np.full(len(done), -0.5, np.float32)
                completion = Completion(response_ids=np.array(done, np.int32), logprobs=logprobs, finish_reason=reason)
                del self.rows[number]
            events.append(TokenEvent(request_id=number, token_id=done[-1], logprob=-0.5, completion=completion))
        return events

    def cancel(self, number):
        return self.rows.pop(number, None) is not None


class ScriptedCritic:
    """Expects a tenth more of the whole with each token that it has read, from -1 on."""

    async def values(self, ids):
        return [place / 10 - 1 for place in range(1, len(ids) + 1)], 12


class ScriptedLink:
    """A replica's app, without Ray between. versions: id -> the name whose script that version writes."""

    back_in_s = 5.0

    def __init__(self, name, tokenizer, step_s, versions=None):
        self.name, self.models = name, (name,)
        self.up, self.ongoing = True, 0
        limits = Limits(max_rows=16)
        reader = PromptReader(tokenizer=tokenizer, positions=POSITIONS, vocab_size=320, limits=limits)
        self.runners, self.apps = [], {}
        for version, script in (versions or {"": name}).items():
            self.runners.append(EngineRunner(ScriptedEngine(script, tokenizer, step_s), max_rows=16, max_waiting_rows=16))
            config = AppConfig(name=name, limits=limits, version=version or None)
            self.apps[version] = build_routes(self.runners[-1], reader, config, ScriptedCritic() if name == "ppo" else None)

    async def answer(self, request):
        app = self.apps.get(request.version) or next(iter(self.apps.values()))
        async for piece in pieces(app, request):
            yield piece

    async def stats(self):
        return dataclasses.asdict(self.runners[0].stats())


class Paged:
    """A running server: its `url`, its `page`, its `links` to the models, its `store` of votes."""

    def __init__(self, tmp_path, chat=True, names=("sft", "ppo"), step_s=0.0, prompts=PROMPTS, canary=None, **settings):
        """canary: (stable version, candidate) of the last model; the stable one writes what the model "sft" does."""
        tokenizer = train_tokenizer([*PROMPTS, *SCRIPT["ppo"].values()], 320)
        tokenizer.chat_template = TEMPLATE if chat else None
        versions = {} if canary is None else {names[-1]: dict(zip(canary, ("sft", names[-1]), strict=True))}
        self.links = [ScriptedLink(name, tokenizer, step_s, versions.get(name)) for name in names]
        options = {name: settings.pop(name) for name in PageOptions.__slots__ if name in settings}
        if prompts:
            (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": each}) + "\n" for each in prompts))
            options["prompts"] = str(tmp_path / "prompts.jsonl")
        options = {"votes": str(tmp_path / "votes.db")} | options
        self.parts = PageParts.opened(PageOptions(**options), tmp_path)
        self.store = self.parts.store
        config = AppConfig(**{"name": names[0], "allowed_hosts": ("localhost",)} | settings)
        front = Front(self.links, tables={name: self._table(*canary) for name in versions if canary is not None})
        if canary is not None:
            front.pages["/versions"] = versions_page(Publisher(front.tables, [], lambda wanted: None))
        self.page = build_page(front, config, self.parts)
        app = guarded(self.page, config, is_of_page)
        bound = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        self.server = HttpServer(app, bound, HttpLimits())
        self.server.start()

    @staticmethod
    def _table(stable, candidate):
        table = VersionTable(Version(id=stable, folder="nowhere"))
        table.admit(Version(id=candidate, folder="nowhere"), 0.1)
        return table

    def close(self):
        self.server.close()
        self.parts.close()
        for link in self.links:
            for runner in link.runners:
                runner.close()

    def send(self, method, path, token=None, **more):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        headers |= more.pop("headers", {})
        return httpx.request(method, self.url + path, timeout=60, headers=headers, verify=WITHOUT_TLS, **more)

    def ask(self, rater="ann", token=None, **body):
        body = body if rater is None else {"rater": rater} | body
        return self.send("POST", "/page/comparisons", token, json=body)

    def vote(self, comparison, choice="left", rater="ann", key=None, token=None, **body):
        body |= {"comparison": comparison, "choice": choice, "key": key or f"{comparison}-{choice}"}
        body |= {} if rater is None else {"rater": rater}
        return self.send("POST", "/page/votes", token, json=body)


@contextlib.contextmanager
def paged(tmp_path, **settings):
    served = Paged(tmp_path, **settings)
    try:
        yield served
    finally:
        served.close()

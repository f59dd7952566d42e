"""Versions of a tiny model, what each of them writes, and clients that ask while versions are swapped; for several test files."""

from __future__ import annotations

import json

import torch
from transformers import AutoModelForCausalLM

from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.publish.client import kept_copy

TOKENS = 24
PROMPTS = ["the cat", "the dog sat on", "then they"]


def variant(folder, target, seed):
    """The same tokenizer and shape, other weights; its version in `target`'s parent."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "wte" not in name:  # as large as the embeddings, so that it writes other tokens
                parameter.normal_(std=0.5)
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    model.save_pretrained(target)
    return kept_copy(target, target.parent)


def greedy(folder):
    """prompt -> the text that the model writes, by transformers' own `generate`."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder)
    found = {}
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        out = model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=False)
        found[prompt] = text.rstrip("\N{REPLACEMENT CHARACTER}")  # an answer that is cut inside a character ends before it
    return found


class Asked:
    """The answers of one client, which asks for a stream every second time, and what was wrong with them."""

    def __init__(self, expected, number):
        self.expected, self.number = expected, number
        self.wrong, self.answers, self.versions, self.over = [], 0, [], False

    def body(self):
        return {
            "model": "m", "prompt": self.prompt, "max_tokens": TOKENS, "min_tokens": TOKENS, "temperature": 0,
            "stream": self.answers % 2 == 0, "ignore_eos": True,
        }  # fmt: skip

    @property
    def prompt(self):
        return PROMPTS[(self.answers + self.number) % len(PROMPTS)]

    def take(self, answer):
        """An answer of httpx's."""
        problem = self._problem(answer)
        if problem is not None:
            self.wrong.append(problem)
        self.answers += 1

    def failed(self, error):
        self.wrong.append(f"{type(error).__name__}: {error}")
        self.answers += 1

    def _problem(self, answer):
        if answer.status_code != 200:
            return f"{answer.status_code} {answer.text[:300]}"
        chunks = [answer.text]
        if self.body()["stream"]:
            *chunks, last = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
            if last != "[DONE]":
                return f"a stream ended with {last}"
        chunks = [json.loads(chunk) for chunk in chunks]
        if any("error" in chunk for chunk in chunks):
            return f"an error in a stream: {chunks[-1]}"
        named = {chunk["system_fingerprint"] for chunk in chunks} | {answer.headers["x-model-version"]}
        if len(named) != 1:
            return f"several versions in one answer: {named}"
        (version,) = named
        self.versions.append(version)
        text, right = "".join(chunk["choices"][0]["text"] for chunk in chunks), self.expected[version][self.prompt]
        return None if text == right else f"{version} on {self.prompt!r}: {text!r}, not {right!r}"

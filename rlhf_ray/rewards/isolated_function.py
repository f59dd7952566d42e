"""A user's scoring function with a time limit for each sample, in a process of its own.   B responses.

A function that hangs, leaks memory or ends its interpreter ends that process and nothing else. The process stays alive
between calls; after a time-out it is killed with its children, and a new one replaces it.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from rlhf_ray.config.columns import NO_COLUMNS, Asked, Columns
from rlhf_ray.errors import UserError
from rlhf_ray.messages import Scores
from rlhf_ray.rewards.finite_scores import UserScore, as_scores, check_finite, sample_words

START_S = 300.0  # for the import of the function's module, which may load a model


def row_of(columns: Columns, place: int) -> dict[str, Any]:
    """The columns' values for one response."""
    return {name: values[place] for name, values in columns.items()}


class IsolatedFunction:
    """(prompts, responses) -> scores, one sample at a time. An error in it is the user's, and is shown with the sample.

    keys: the recipe's keys of (time limit, score of a late sample), for the message about a late sample
    """

    def __init__(self, path: str, *, timeout_s: float, timeout_score: float | None, keys: tuple[str, str]):
        self.path, self.timeout_s, self.timeout_score, self.keys = path, timeout_s, timeout_score, keys
        self._process = FunctionProcess(path)

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool], columns: Columns = NO_COLUMNS
    ) -> Scores:
        samples = enumerate(zip(prompts, responses, strict=True))
        answers = [self._one(prompt, response, columns, place) for place, (prompt, response) in samples]
        late = np.array([answer is None for answer in answers], bool)
        total = as_scores(np.array([self.timeout_score if answer is None else answer for answer in answers], np.float64))
        return Scores(total=total, late=late)

    def close(self) -> None:
        self._process.end()

    def _one(self, prompt: str, response: str, columns: Columns, place: int) -> float | None:
        """The score of a sample; None: it took too long, and the recipe has a score for that."""
        row = row_of(columns, place)
        if not self._process.alive:
            self._process = FunctionProcess(self.path)
        asked = self._process.asked.of({name: [value] for name, value in row.items()}, [prompt])
        row = {name: value for name, (value,) in asked.items()}
        sample = sample_words(prompt, response, row)
        answer = self._process.ask({"prompt": prompt, "response": response, "columns": row}, self.timeout_s)
        if answer is None:
            return self._late(sample)
        if "ended" in answer:
            raise UserError(f"{self.path} ended its process ({answer['ended']}) on {sample}; correct the function")
        if "raised" in answer:
            raise UserError(f"{self.path} raised {answer['raised']} on {sample}")
        if "returned" in answer:
            raise UserError(f"{self.path} returned {answer['returned']} for {sample}; return one number each")
        try:
            check_finite(
                UserScore, f"{self.path} returned", np.array([answer["score"]]), [prompt], [response],
                {name: [value] for name, value in row.items()},
            )  # fmt: skip
        except UserScore as error:
            error.place = place
            raise
        return answer["score"]

    def _late(self, sample: str) -> None:
        self._process.end()
        if self.timeout_score is None:
            limit, score = self.keys
            raise UserError(
                f"{self.path} took longer than {self.timeout_s:g} s ({limit}) on {sample}; make it faster, raise the limit, "
                f"or set {score} to score such samples"
            )


class FunctionProcess:
    """One `function_worker`. Raises UserError where its function can't be imported."""

    def __init__(self, path: str):
        # -P and the whole path: exactly the modules of this process, under an actor's search path too.
        search = os.pathsep.join(os.path.abspath(place) for place in sys.path)
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "rlhf_ray.rewards.function_worker", path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": search},
            start_new_session=True,  # a group of its own, so that its children end with it
        )  # fmt: skip
        assert self._popen.stdin is not None and self._popen.stdout is not None  # pipes, as asked for
        self._input, self._output = self._popen.stdin, self._popen.stdout
        self._end = weakref.finalize(self, _end_group, self._popen)
        self._pending = b""
        answer = self._answer(START_S)
        if answer is None or "ready" not in answer:
            self.end()
            raise UserError(_refusal(path, answer))
        self.asked = Asked(tuple(answer["needed"]), tuple(answer["welcome"]), answer["everything"])

    @property
    def alive(self) -> bool:
        return self._end.alive and self._popen.poll() is None

    def ask(self, request: dict, timeout_s: float) -> dict | None:
        """The answer; None after timeout_s without one; {"ended": how} where the process is gone."""
        try:
            self._input.write(json.dumps(request, default=str).encode() + b"\n")
            self._input.flush()
        except OSError:  # it ended between two calls
            return {"ended": self._how_it_ended()}
        return self._answer(timeout_s)

    def end(self) -> None:
        self._end()

    def _answer(self, timeout_s: float) -> dict | None:
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(max(deadline - time.monotonic(), 0.0)):
                    return None
                part = os.read(self._output.fileno(), 65536)
                if not part:
                    return {"ended": self._how_it_ended()}
                self._pending += part
        line, _, self._pending = self._pending.partition(b"\n")
        return json.loads(line)

    def _how_it_ended(self) -> str:
        code = self._popen.wait()
        self.end()
        return f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def _refusal(path: str, answer: dict | None) -> str:
    if answer is None:
        return f"{path} was not imported within {START_S:.0f} s; make its module's import faster"
    if "ended" in answer:
        return f"{path} ended its process ({answer['ended']}) while its module was imported; correct the module"
    return answer["refused"]


def _end_group(popen: subprocess.Popen) -> None:
    """End the process and those that it started."""
    with suppress(ProcessLookupError):
        os.killpg(popen.pid, signal.SIGKILL)
    popen.wait()
    for pipe in (popen.stdin, popen.stdout):
        if pipe is not None:
            with suppress(OSError):  # what was not sent yet can't be sent any more
                pipe.close()

"""The request log: a line of JSON per answer. No texts unless they are asked for, and never a key."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TextIO

from rlhf_ray.config.user_paths import expanded
from rlhf_ray.errors import UserError
from rlhf_ray.serving.answered import Answered


class RequestLog:
    """A listener of the front's. UserError where the file can't be written."""

    def __init__(self, path: str | Path, *, texts: bool):
        self.path, self.texts = expanded(path), texts
        self._file: TextIO | None = None
        try:
            # For the owner alone: texts may be in it.
            self.path.touch(mode=0o600)
            self._file = open(self.path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - until `close`
        except OSError as error:
            raise UserError(f"the request log {path} can't be written ({error.strerror}); give another file") from None

    def ended(self, answer: Answered) -> None:
        if self._file is None:
            return
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(answer.started)) + f".{int(answer.started % 1 * 1000):03d}Z",
            "id": answer.request_id,
            "method": answer.method,
            "path": answer.path[:200],
            "status": answer.status,
            "failed": answer.failed,
            "model": answer.model,
            "version": answer.version,
            "replica": answer.replica,
            "taken_over": answer.taken_over,
            "seconds": round(answer.seconds, 4),
            "first_s": None if answer.first_s is None else round(answer.first_s, 4),
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
        }
        if self.texts:
            line["texts"] = [{"prompt": prompt, "response": response} for prompt, response in answer.texts]
        try:
            self._file.write(json.dumps(line, ensure_ascii=True) + "\n")
        except OSError:  # the disk is full: answers matter more than their log
            return

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

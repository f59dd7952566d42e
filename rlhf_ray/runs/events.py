"""events.jsonl: every failure a run saw, what was done about it, and what it cost."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf_ray.runs.storage import read_lines


class EventLog:
    """Appends to a run's events.jsonl. Several processes may: each line is one write to a file opened for append."""

    def __init__(self, path: Path):
        self.path = Path(path)

    def add(self, what: str, done: str, cost_s: float | None = None, **details: Any) -> dict[str, Any]:
        """what: what failed ("reward actor 1 died"); done: the reaction ("restarted, chunk 3 sent again");
        cost_s: seconds lost, None if unknown; details: short JSON values, e.g. stage="ppo", step=17."""
        event: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "what": what,
            "done": done,
            "cost_s": None if cost_s is None else round(cost_s, 3),
            **details,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, (json.dumps(event) + "\n").encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return event

    def read(self) -> list[dict[str, Any]]:
        return read_lines(self.path)

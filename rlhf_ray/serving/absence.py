"""How long a replica that has ended is expected to be away."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Absence:
    """Of one replica. Times in seconds, `now` on one clock."""

    start_s: float
    """As long as its last start took, from its end until it ran again."""
    since: float | None = None
    """None: it runs."""

    def note(self, up: bool, now: float) -> None:
        if up and self.since is not None:
            self.start_s, self.since = now - self.since, None
        elif not up and self.since is None:
            self.since = now

    def left_s(self, now: float) -> float:
        """The rest of a start; once that is over, as long again as it has been away. 0: it runs."""
        if self.since is None:
            return 0.0
        passed = now - self.since
        return self.start_s - passed if passed < self.start_s else passed

"""Which version of a model a request goes to. No Ray, no HTTP.

admit(v, 0.1)        the candidate takes 1 of 10 requests, the stable version the others
admit(v, 1.0)        the candidate takes all; the stable version stays in memory, to go back to
promote()            the candidate becomes the stable version
drop_candidate()     the stable version takes all again
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_ray.publish.version import Version


class NoSuchVersion(Exception):
    """A request asks for a version that takes no requests."""


class VersionTable:
    """The versions of one model. A request that has begun is counted with its version until it ends."""

    def __init__(self, stable: Version):
        self.stable = stable
        self.candidate: Version | None = None
        self.share = 0.0
        """Of new requests that go to the candidate."""
        self.earlier: list[Version] = []
        """Stable versions of before, the last one last."""
        self.ongoing: Counter[str] = Counter()
        self._leaving: dict[str, Version] = {}
        self._owed = 0.0  # requests that are the candidate's by its share, and that it has not had

    def choose(self, pinned: str | None = None) -> Version:
        """For one new request. NoSuchVersion where it asks for one that takes none."""
        if pinned is not None:
            found = next((each for each in self.taking if each.id == pinned), None)
            if found is None:
                raise NoSuchVersion(pinned)
            return found
        if self.candidate is None:
            return self.stable
        self._owed += self.share
        if self._owed < 1 - 1e-9:
            return self.stable
        self._owed -= 1
        return self.candidate

    @contextmanager
    def serving(self, version: Version) -> Iterator[None]:
        """While a request is answered by it."""
        self.ongoing[version.id] += 1
        try:
            yield
        finally:
            self.ongoing[version.id] -= 1

    @property
    def taking(self) -> tuple[Version, ...]:
        """Those that take new requests, the stable one first."""
        return (self.stable,) if self.candidate is None else (self.stable, self.candidate)

    @property
    def held(self) -> list[Version]:
        """Those that replicas have to hold, the stable one first: what takes requests, and what still answers some."""
        busy = [each for each in self._leaving.values() if self.ongoing[each.id] and each not in self.taking]
        return [*self.taking, *busy]

    @property
    def leaving(self) -> bool:
        """Whether a version that takes no requests any more is still remembered."""
        return bool(self._leaving)

    def forget_idle(self) -> list[Version]:
        """Those that have answered their last request; they are remembered no longer."""
        gone = [each for each in self._leaving.values() if not self.ongoing[each.id]]
        for each in gone:
            del self._leaving[each.id]
        return gone

    def admit(self, version: Version, share: float) -> None:
        """It becomes the candidate with this share, 0 to 1; or the candidate's share changes."""
        assert 0 < share <= 1 and version != self.stable
        if self.candidate is not None and self.candidate != version:
            if self.share == 1:
                self.promote()  # it has taken all requests: what it replaced is not needed any more
            else:
                self.drop_candidate()
        self._leaving.pop(version.id, None)
        self.candidate, self.share, self._owed = version, share, 0.0

    def promote(self) -> None:
        assert self.candidate is not None
        self.earlier = [each for each in self.earlier if each != self.candidate] + [self.stable]
        self._leaving[self.stable.id] = self.stable
        self.stable, self.candidate, self.share = self.candidate, None, 0.0

    def drop_candidate(self) -> None:
        assert self.candidate is not None
        self._leaving[self.candidate.id] = self.candidate
        self.candidate, self.share = None, 0.0

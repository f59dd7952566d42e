"""What the page is told when the server starts."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_ray.serving.config import checked_number


@dataclass(frozen=True, slots=True, kw_only=True)
class PageOptions:
    """The defaults: chat and playground, and no votes."""

    votes: str | None = None
    """The database of votes (a path or URL), made where there is none; None: nobody can vote."""
    prompts: str | None = None
    """A file of prompts to compare answers to; None: those that the served run was trained on, if it is a run."""
    invited_only: bool = False
    """Raters need a link of their own. So they do wherever an API key is required."""
    votes_per_comparison: int = 2
    """A comparison is shown to further raters until it has so many votes."""
    votes_per_minute: int = 60
    """Of one rater; as many comparisons may be asked for."""
    reward_url: str | None = None
    """Where /get_reward answers: the playground shows rewards."""

    def __post_init__(self) -> None:
        checked_number("votes_per_comparison", self.votes_per_comparison, 1, whole=True)
        checked_number("votes_per_minute", self.votes_per_minute, 1, whole=True)

"""Versions of a policy in training, into the server of its run (ppo.publish_every). Beside the training, which never waits for
it and never ends by it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from rlhf_ray.actors.groups import RayRoles
from rlhf_ray.config import Recipe
from rlhf_ray.errors import UserError
from rlhf_ray.models.card import model_card
from rlhf_ray.ppo.loop import LoopState
from rlhf_ray.publish.client import ANSWER_S, drop_copies, kept_copy, publish
from rlhf_ray.publish.servers import server_of
from rlhf_ray.runs.elsewhere import take_in
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.run_folder import RunFolder

Progress = Callable[[dict], None]


class Publishing:
    """One version at a time: while one is on its way, a later one is left out, and told of."""

    def __init__(self, recipe: Recipe, run: RunFolder, roles: RayRoles, progress: Progress):
        self.recipe, self.run, self.roles, self.progress = recipe, run, roles, progress
        self.events = EventLog(run.events)
        self.shelf = run.path / "published"
        self._thread: threading.Thread | None = None

    def publish(self, state: LoopState) -> None:
        """The policy as it is now. The last one of the training is waited for."""
        self.shelf.mkdir(exist_ok=True)
        written, card = self.shelf / f".step_{state.step}", model_card(self.recipe, "ppo", {"steps": state.step})
        self.roles.waiter.get(
            self.roles.policy.call("save_version", written, card), "writing a version for the server"
        )
        take_in(self.run, written)
        self.start(written, state.step)
        if state.step >= self.recipe.ppo.steps:
            self.join(ANSWER_S)

    def start(self, written: Path, step: int) -> None:
        """Send what is in `written`, which goes."""
        if self._thread is not None and self._thread.is_alive():
            self._tell(step, "the version before it is still being loaded", "left this one out")
            shutil.rmtree(written, ignore_errors=True)
            return
        self._thread = threading.Thread(target=self._send, args=(written, step), name="publishing", daemon=True)
        self._thread.start()

    def join(self, longest_s: float) -> None:
        """Wait for the version that is on its way."""
        if self._thread is not None:
            self._thread.join(longest_s)

    def _send(self, written: Path, step: int) -> None:
        try:
            note = server_of(self.run.path)
            if note is None:
                raise UserError(f"no server of this run is up on this machine; start one: rlhf-ray serve {self.run.path}/sft/model")
            version = kept_copy(written, self.shelf)
            state = publish(note, version, share=self.recipe.ppo.publish_share)
            self.progress({"stage": "ppo", "published": version.id, "step": step})
            versions = [each["id"] for each in state["versions"]] + state["earlier"][-2:]
            drop_copies(self.shelf, {*versions, version.id})
        except UserError as error:
            self._tell(step, str(error), "went on training")
        except Exception as error:  # fault boundary: a version for the server; the training goes on
            self._tell(step, f"{type(error).__name__}: {error}", "went on training")
        finally:
            shutil.rmtree(written, ignore_errors=True)

    def _tell(self, step: int, what: str, done: str) -> None:
        self.events.add(f"the version of step {step} was not published: {what}", done, stage="ppo")

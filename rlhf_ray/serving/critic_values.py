"""POST /v1/values: what the critic of the served run expects after each token of a text.

    {"model": NAME, "prompt": [token id, ...]}  ->  {"object": "values", "model": NAME, "values": [...], "step": N}

values[i] is the value of the state after token i has been read: the reward that PPO's critic, as its last checkpoint (of step N)
has it, expects of the whole. The value before a token is that after the one in front of it.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from rlhf_ray.errors import UserError
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.serving.api_errors import ApiError, bad_request
from rlhf_ray.serving.request_parts import Several, StrictBody

if TYPE_CHECKING:
    from rlhf_ray.models.critic import Critic

VALUES = "/v1/values"


class ValuesRequest(StrictBody):
    """A text as token ids."""

    model: str
    prompt: Several[Annotated[int, Field(ge=0)]] = Field(min_length=1, description="token ids")


def keeps_critic(run: Path) -> bool:
    """Whether a served path is a run folder whose PPO has left a critic. Read from names of files: no torch."""
    return (run / "recipe.yaml").is_file() and any(run.glob("ppo/checkpoints/step_*/critic-*-of-*.safetensors"))


class CriticRunner:
    """Reads the critic at the first request, then one text after the other, in a thread of its own."""

    def __init__(self, run: str):
        self._run = RunFolder(Path(run))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="critic")
        self._loaded: tuple[Critic, int] | None = None

    async def values(self, ids: list[int]) -> tuple[list[float], int]:
        """-> of each token, and the step of PPO that the critic is of. ApiError for ids that it can't read."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._values, ids)

    def _values(self, ids: list[int]) -> tuple[list[float], int]:
        import torch

        from rlhf_ray.ppo.trained_critic import trained_critic
        from rlhf_ray.serving.loading import LOADING

        if self._loaded is None:
            try:
                with LOADING:
                    self._loaded = trained_critic(self._run)
            except UserError as error:
                raise ApiError(404, f"There is no critic: {error}.", code="no_critic") from None
        critic, step = self._loaded
        text = critic.config.get_text_config()
        if max(ids) >= text.vocab_size or len(ids) > (text.max_position_embeddings or len(ids)):
            raise bad_request("prompt is longer than the critic reads, or has ids beyond its vocabulary.", param="prompt")
        with torch.inference_mode():
            return critic(torch.tensor([ids])).squeeze(0).tolist(), step


def no_critic() -> ApiError:
    return ApiError(404, "This model has no critic: it is no run whose PPO keeps a checkpoint of one.", code="no_critic")


def body_of(name: str, values: list[float], step: int) -> dict[str, Any]:
    return {"object": "values", "model": name, "values": values, "step": step}

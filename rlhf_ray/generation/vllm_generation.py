"""vLLM as a generation engine: prompts and seeds in, responses with the log-probs they were drawn from out.

The contract of `generation.engine_protocol`, in this process; no open batch. A second copy of the model, a
plain Hugging Face one, says what the weights are; vLLM's are written from it, in place, and after every
write the log-probs of a few sampled tokens must be those of the copy (`_check`).

An engine belongs to one thread. Its result depends on (weights, prompts, seeds, params), the whole batch included: in
another batch a row's logits differ in their last digits, so that now and then a token differs too.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf_ray.config.sampling_params import Completion, SamplingParams
from rlhf_ray.errors import RunFailed, UserError
from rlhf_ray.generation.engine_protocol import EngineSetting
from rlhf_ray.generation.vllm_start import check_vllm, start_vllm
from rlhf_ray.generation.vllm_weights import cache_bytes, copy_device, pack_embeddings_again, untied
from rlhf_ray.models.chat_shape import end_ids
from rlhf_ray.models.host_memory import HostCopy
from rlhf_ray.models.load import to_device
from rlhf_ray.models.wire import Weight, copy_weights
from rlhf_ray.tables.engines import ENGINES

PROBES, PROBE_TOKENS = 4, 8  # the gate draws this many responses of this many tokens
PROBE_PROMPT = 32  # tokens of each prompt at most: the copy may compute on CPUs
#: Largest difference in a token's log-prob between vLLM and the copy. Measured on models of 0.1 M parameters: up to 2e-6 in
#: float32 and 0.05 in bfloat16, where the two round in other places; 1.5 to 2.5 under an output layer of old weights.
GATE = {torch.float32: 0.01, torch.bfloat16: 0.2}
COLDEST = ENGINES["vllm"].coldest


def vllm_engine(setting: EngineSetting) -> VllmEngine:
    """As the table of engines makes it. It needs to know the longest sequence, and prompts to try its weights on."""
    assert setting.longest is not None and setting.probes
    return VllmEngine(
        setting.folder, setting.model, setting.tokenizer, longest=setting.longest, rows=setting.rows, probes=setting.probes,
        device=setting.device, eos_token_ids=setting.eos_token_ids, trust_remote_code=setting.trust_remote_code,
        tensor_parallel=setting.tensor_parallel, shares_gpu=setting.shares_gpu,
    )  # fmt: skip


class VllmEngine:
    """Draws responses with vLLM.

    folder: the Hugging Face folder (or hub name) of `model`, for vLLM to build its own from. model: the copy, in the dtype
    that vLLM computes in; taken over, kept on `copy_device`. longest: tokens of the longest prompt with its response; rows: how
    many decode at a time (the cache holds that many of the longest). probes: prompts that the gate draws from.
    """

    def __init__(
        self,
        folder: str | Path,
        model: PreTrainedModel,
        tokenizer,
        *,
        longest: int,
        rows: int,
        probes: Sequence[Sequence[int] | np.ndarray],
        device: torch.device | str = "cpu",
        eos_token_ids: Sequence[int] | None = None,
        trust_remote_code: bool = False,
        tensor_parallel: int = 1,
        shares_gpu: bool = False,
    ):
        self.device = torch.device(device)
        check_vllm(self.device)
        if eos_token_ids is None:
            if tokenizer.eos_token_id is None:
                raise UserError("the tokenizer has no EOS token, so no response could end; set tokenizer.eos_token")
            eos_token_ids = end_ids(tokenizer)
        there = copy_device(self.device, tensor_parallel, shares_gpu=shares_gpu)
        self.model, self.eos_token_ids, self.longest = to_device(model, there).eval(), tuple(eos_token_ids), longest
        self.on_host = HostCopy(self.model, pinned=True) if there != self.device else None
        self.probe_tokens = min(PROBE_TOKENS, longest - 1)
        last = min(PROBE_PROMPT, longest - self.probe_tokens)
        self.probes = [np.asarray(ids)[-last:].tolist() for ids in probes[:PROBES]]
        self.tensor_parallel = tensor_parallel
        # Log-probs of the distribution that a token is drawn from.
        self.llm, self.asleep = start_vllm(
            folder, self.model, self.device, longest=longest, rows=rows, cache=cache_bytes(self.model, longest, rows),
            tensor_parallel=tensor_parallel, trust_remote_code=trust_remote_code, logprobs_mode="processed_logprobs",
        ), False  # fmt: skip
        self._rehearse()

    # ---- generation

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int] | np.ndarray],
        seeds: Sequence[int],
        params: SamplingParams | Sequence[SamplingParams],
    ) -> list[Completion]:
        """One response to each prompt. Row b draws with seeds[b] (and params[b], if several)."""
        each = [params] * len(prompt_ids) if isinstance(params, SamplingParams) else params
        prompts = [
            self._checked(place, ids, one) for place, (ids, one) in enumerate(zip(prompt_ids, each, strict=True))
        ]
        if not prompts:
            return []
        self._wake()
        # What ran before must not matter: a prompt whose keys are cached takes another path through the kernels.
        self.llm.reset_prefix_cache()
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            [self._vllm_params(one, seed) for one, seed in zip(each, seeds, strict=True)],
            use_tqdm=False,
        )
        return [self._completion(output.outputs[0], one) for output, one in zip(outputs, each, strict=True)]

    def _checked(self, place: int, prompt_ids, params: SamplingParams) -> list[int]:
        ids = np.asarray(prompt_ids, np.int64)
        if ids.ndim != 1 or len(ids) == 0:
            raise UserError(f"prompt {place} has no tokens; give it at least one (for example BOS or EOS)")
        if len(ids) + params.max_new_tokens > self.longest:
            raise UserError(
                f"a prompt of {len(ids)} tokens and max_new_tokens = {params.max_new_tokens} need "
                f"{len(ids) + params.max_new_tokens} positions, but this engine was started for {self.longest}; "
                "shorten the prompt or lower max_new_tokens"
            )
        if 0 < params.temperature < COLDEST:
            raise UserError(
                f"temperature = {params.temperature} is below {COLDEST}, the least that vLLM draws at; raise it, or set "
                "generation.engine to torch"
            )
        return ids.tolist()

    def _vllm_params(self, params: SamplingParams, seed: int):
        from vllm import SamplingParams as VllmParams

        return VllmParams(
            max_tokens=params.max_new_tokens,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=int(seed) % 2**63,
            logprobs=0,  # of the token drawn, and no others
            # EOS as any token that ends a response: it comes back as stop_reason, and is always part of the response.
            ignore_eos=True,
            stop_token_ids=None if _has_minimum(params) else list(self.eos_token_ids),
            stop=list(params.stop),
            include_stop_str_in_output=True,
            detokenize=bool(params.stop),
            skip_special_tokens=False,
        )

    def _completion(self, output, params: SamplingParams) -> Completion:
        tokens = np.array(output.token_ids, np.int32)
        logprobs = np.array([at[token].logprob for at, token in zip(output.logprobs, output.token_ids, strict=True)])
        if not np.isfinite(logprobs).all():
            raise FloatingPointError(
                f"log-prob {int(np.flatnonzero(~np.isfinite(logprobs))[0])} of a response is not finite"
            )
        reason = output.finish_reason
        if reason == "stop" and not isinstance(output.stop_reason, str):
            reason = "eos"
        if _has_minimum(params):
            # vLLM's own min_tokens forbids EOS, and so draws from another distribution than the policy's.
            ends = np.flatnonzero(np.isin(tokens, self.eos_token_ids)) + 1
            ends = ends[ends >= params.min_new_tokens]
            if len(ends):
                tokens, logprobs, reason = tokens[: ends[0]], logprobs[: ends[0]], "eos"
        return Completion(response_ids=tokens, logprobs=logprobs.astype(np.float32), finish_reason=reason)

    # ---- weights

    def load_weights(self, state: Mapping[str, Weight], kept: Set[str] = frozenset()) -> None:
        """Copy new weights into the model, in place; nothing of state is kept, and it may be read-only.

        Every weight but those in `kept`, which stay, must be there (`models.wire.copy_weights`).
        """
        copy_weights(self.model, state, kept)
        self.model_changed()

    def model_changed(self) -> None:
        """Write the copy's weights into vLLM's model, and see that they arrived. Raises RunFailed if they did not."""
        self._write()
        gap = self.gap()
        if not gap <= GATE[self.model.dtype]:  # NaN is not
            raise RunFailed(
                f"vLLM's log-probs differ by {gap:.3g} from those of the weights that it was given, above "
                f"{GATE[self.model.dtype]}: not all of them arrived, or it computes something else from this "
                f"{type(self.model).__name__}; set generation.precision to float32, or generation.engine to torch"
            )

    def _write(self) -> None:
        self._wake()
        # vLLM's own way: layer by layer it loads by the names of a checkpoint and repeats what follows loading.
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._weights()})
        self.llm.apply_model(pack_embeddings_again)
        self.llm.reset_prefix_cache()

    def _weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        """For vLLM's model in this process, or, where the copy is on the host, for parts of it in processes of their own too."""
        return untied(self.model) if self.on_host is None else self.on_host.named(untied(self.model))

    @torch.no_grad()
    def gap(self) -> float:
        """Largest difference between vLLM's log-prob of a token that it samples and the copy's."""
        params, largest = SamplingParams(max_new_tokens=self.probe_tokens), 0.0
        for ids, drawn in zip(self.probes, self.generate(self.probes, range(len(self.probes)), params), strict=True):
            response = torch.from_numpy(drawn.response_ids).long()
            sequence = torch.cat([torch.tensor(ids), response]).to(self.model.device)
            logits = self.model(sequence[None, :-1]).logits[0, len(ids) - 1 :].float().cpu()
            expected = logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]
            # Not max(): Python's drops a NaN.
            largest = float(torch.tensor([largest, *(expected - torch.from_numpy(drawn.logprobs)).abs()]).max())
        return largest

    def _rehearse(self) -> None:
        """Before the first real update, which is small: a large one, there and back.

        Every second number of every weight changes its sign. A layer that kept its old weights is far off then. After
        steps of a small learning rate it would hide among rounding errors for long.
        """
        for _ in range(2):
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.data = parameter.data.contiguous()
                    parameter.view(-1)[::2].neg_()
            self.model_changed()

    # ---- memory

    def sleep(self) -> None:
        """Give back the GPU's memory (weights to the host, cache dropped) until there is work. CPUs: nothing to give."""
        if self.device.type == "cuda" and not self.asleep:
            self.llm.sleep(level=1)
            self.asleep = True

    def close(self) -> None:
        """vLLM's weights and cache go; it is not asked again."""
        del self.llm
        if self.on_host is not None:
            self.on_host.close()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _wake(self) -> None:
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False


def _has_minimum(params: SamplingParams) -> bool:
    """Whether there can be an EOS that does not end the response."""
    return params.min_new_tokens > 1

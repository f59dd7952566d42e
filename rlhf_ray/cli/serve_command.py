"""The command `rlhf-ray serve`: only its options; what it does is in the package `serving`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.cli.command_errors import in_words
from rlhf_ray.errors import UserError

Served = Annotated[str | None, typer.Argument(help="a run folder or a Hugging Face model folder, or the URL of a run in a store")]
Stage = Annotated[str, typer.Option(help="policy, or reward: the run's reward model at /get_reward (OpenRLHF's protocol)")]
Models = Annotated[
    list[str] | None,
    typer.Option(help="NAME=PATH: a further model at the same endpoint, or an adapter on the first one (repeatable)"),
]
Also = Annotated[
    list[str] | None, typer.Option(help="a further model of the run, by its name: base, sft, dpo, ppo, best, or all (repeatable)")
]
Host = Annotated[str, typer.Option(help="address to bind; beyond loopback an API key is required")]
Port = Annotated[int, typer.Option(help="0 takes a free one")]
KeyFile = Annotated[
    Path | None, typer.Option(help="file with the key that clients must send as bearer token; else RLHF_RAY_API_KEY's")
]
Key = Annotated[str | None, typer.Option(hidden=True)]
Hosts = Annotated[list[str] | None, typer.Option(help="further name that requests may have as Host (repeatable)")]
Origins = Annotated[
    list[str] | None, typer.Option(help="origin whose web pages may use the server, https://NAME (repeatable)")
]
Drain = Annotated[float, typer.Option(help="how long SIGTERM and --stop wait for running requests")]
Name = Annotated[str | None, typer.Option(help="the model's id; default: the folder's name")]
Replicas = Annotated[int, typer.Option(help="copies of the engine")]
Gpus = Annotated[float | None, typer.Option(help="GPUs per replica; default: one where there are enough")]
Threads = Annotated[int | None, typer.Option(help="torch threads per replica; default: an equal share of the cores")]
Precision_ = Annotated[str, typer.Option("--precision", help="auto, float32 or bfloat16")]
Engine = Annotated[str | None, typer.Option(help="generation engine; default: the run's if it can serve, else torch")]
TrustCode = Annotated[bool, typer.Option(help="run Python code that the model folder brings along")]
SpecialTokens = Annotated[
    bool, typer.Option(help="clients may write special tokens by their names; default: these are plain text")
]
RequestLog_ = Annotated[
    Path | None, typer.Option("--request-log", help="file that gets a line of JSON for each answer, without texts")
]
LogTexts = Annotated[bool, typer.Option("--log-texts", help="prompts and responses in the request log too")]
JudgeUrl = Annotated[
    str | None, typer.Option("--judge", help="address of a reward server that scores answers, to compare versions by")
]
Detach = Annotated[bool, typer.Option("--detach", help="return when the server answers; it goes on without the terminal")]
Stop = Annotated[bool, typer.Option("--stop", help="end a server of this machine's: that of the run, or of --port")]
PromptTokens = Annotated[int | None, typer.Option(help="longest prompt; default: the model's positions less one")]
Tokens = Annotated[int | None, typer.Option(help="longest completion")]
N = Annotated[int, typer.Option(help="choices per prompt")]
Rows = Annotated[int, typer.Option(help="choices decoded together, per replica")]
Waiting = Annotated[int, typer.Option(help="choices that may wait; more are refused with 429")]
CacheTokens = Annotated[
    int | None, typer.Option(help="choices decoded together times tokens of the longest, per replica; default: by free memory")
]
Body = Annotated[int, typer.Option(help="largest request body")]
Connections = Annotated[int, typer.Option(help="open connections")]
VotesUrl = Annotated[str | None, typer.Option("--votes", help="the database that keeps people's votes; made if there is none")]
Prompts = Annotated[
    str | None, typer.Option(help="file of prompts to compare answers to; default: those that the run was trained on")
]
InvitedOnly = Annotated[
    bool, typer.Option("--invited-only", help="raters need a link (`rlhf-ray votes invite`), also on loopback")
]
PerComparison = Annotated[int, typer.Option(help="so many raters judge each comparison")]
PerMinute = Annotated[int, typer.Option(help="the most votes of one rater")]
RewardUrl = Annotated[str | None, typer.Option(help="where /get_reward answers, for the playground")]


@in_words
def serve(
    context: typer.Context, path: Served = None, model: Models = None, also: Also = None, stage: Stage = "policy",
    host: Host = "127.0.0.1", port: Port = 8000, api_key_file: KeyFile = None, api_key: Key = None,
    allowed_host: Hosts = None, cors_origin: Origins = None, drain_s: Drain = 120.0, name: Name = None,
    replicas: Replicas = 1, gpus: Gpus = None, threads: Threads = None,
    precision: Precision_ = "auto", engine: Engine = None, trust_remote_code: TrustCode = False,
    allow_special_tokens: SpecialTokens = False, request_log: RequestLog_ = None, log_texts: LogTexts = False,
    judge: JudgeUrl = None, detach: Detach = False, stop: Stop = False, max_prompt_tokens: PromptTokens = None,
    max_tokens: Tokens = None, max_n: N = 16, max_rows: Rows = 32, max_waiting_rows: Waiting = 128,
    max_cache_tokens: CacheTokens = None, max_body_bytes: Body = 1 << 20, max_connections: Connections = 512,
    votes: VotesUrl = None, prompts: Prompts = None, invited_only: InvitedOnly = False,
    votes_per_comparison: PerComparison = 2, votes_per_minute: PerMinute = 60, reward_url: RewardUrl = None,
):  # fmt: skip
    """Put a model behind Ray Serve with OpenAI's HTTP API and a page at / to chat, compare and vote; or a reward model behind
    OpenRLHF's interface."""
    from rlhf_ray.runs.contents import to_serve
    from rlhf_ray.runs.remote import local_copy, reading_copy
    from rlhf_ray.serving import detach as apart
    from rlhf_ray.serving.config import Limits, Notes, given_key
    from rlhf_ray.serving.launch import serve as serve_model
    from rlhf_ray.serving.page.options import PageOptions
    from rlhf_ray.serving.served import named_folders

    if stop:
        given = context.get_parameter_source("port")
        apart.stop(port if given is not None and given.name == "COMMANDLINE" else None, path and reading_copy(path), drain_s)
        return
    if path is None:
        raise UserError("serve needs a run folder or a model folder: rlhf-ray serve runs/demo")
    limits = Limits(
        max_prompt_tokens=max_prompt_tokens, max_tokens=max_tokens, max_n=max_n, max_rows=max_rows,
        max_waiting_rows=max_waiting_rows, max_cache_tokens=max_cache_tokens, max_body_bytes=max_body_bytes,
        max_connections=max_connections,
    )  # fmt: skip
    if precision not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--precision {precision!r} is none of auto, float32, bfloat16")
    if stage not in ("policy", "reward"):
        raise UserError(f"--stage {stage!r} is none of policy, reward")
    key = given_key(api_key, api_key_file)
    if detach:
        apart.detach([argument for argument in sys.argv[1:] if argument != "--detach"])
        return
    serve_model(
        local_copy(path, to_serve), more_models=named_folders(model or ()), also=also or (), host=host, port=port, api_key=key,
        allowed_hosts=allowed_host or (), cors_origins=cors_origin or (), drain_s=drain_s, name=name or _name_of(path),
        replicas=replicas, gpus=gpus, threads=threads, precision=precision, engine=engine, trust_remote_code=trust_remote_code,
        allow_special_tokens=allow_special_tokens,
        limits=limits, stage=stage, notes=Notes(request_log=request_log, log_texts=log_texts, judge=judge),
        page=PageOptions(
            votes=votes, prompts=prompts, invited_only=invited_only, votes_per_comparison=votes_per_comparison,
            votes_per_minute=votes_per_minute, reward_url=reward_url,
        ),
    )  # fmt: skip


def _name_of(path: str) -> str | None:
    """The id of a model whose run is in a store: that of the URL, not of its copy here."""
    from rlhf_ray.runs.remote_store import is_url

    parts = path.rstrip("/").split("/")
    if not is_url(path):
        return None
    return f"{parts[-3]}-{parts[-2]}" if parts[-1] == "model" and len(parts) > 4 else parts[-1]

"""The page's HTTP interface, under /page/. The body of every POST is JSON; errors have OpenAI's form."""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.responses import JSONResponse, Response

from rlhf_ray.errors import RunFailed
from rlhf_ray.serving.api_errors import ApiError, bad_request, error_body, install_error_handlers
from rlhf_ray.serving.openapi import describe_bodies
from rlhf_ray.serving.page import playground
from rlhf_ray.serving.page.bodies import (
    ChatBody,
    ComparisonRequest,
    Name,
    PlaygroundBody,
    ResultFilters,
    ShownComparison,
    VoteAnswer,
    VoteList,
    VoteRequest,
    Writer,
)
from rlhf_ray.serving.page.comparing import Comparing, shown
from rlhf_ray.serving.page.options import PageOptions
from rlhf_ray.serving.page.raters import RateLimit, Raters
from rlhf_ray.serving.page.relay_chat import RelayedAnswer
from rlhf_ray.serving.page.served_answers import Models, request_for
from rlhf_ray.serving.page.vote_results import Results
from rlhf_ray.serving.request_bodies import parse, said
from rlhf_ray.serving.streaming import ClientLeft, while_connected
from rlhf_ray.votes.records import Prompt, UnknownComparison, Vote, VoteRefused
from rlhf_ray.votes.store import VoteStore

BODIES = {
    "/page/chat": ChatBody, "/page/comparisons": ComparisonRequest, "/page/votes": VoteRequest,
    "/page/playground": PlaygroundBody,
}  # fmt: skip
PATHS = ("/page/about", *BODIES, "/page/results")


class Routes:
    """One method per route. store: None where the server keeps no votes."""

    def __init__(
        self, models: Models, store: VoteStore | None, raters: Raters, prompts: list[Prompt], options: PageOptions, longest: int
    ):  # fmt: skip
        self.models, self.store, self.raters, self.prompts, self.options = models, store, raters, prompts, options
        self.comparing = store and Comparing(
            store, models, prompts, options.votes_per_comparison, as_they_are=options.prompts is None, longest=longest
        )
        self.found = store and Results(store.database)
        self.voting, self.asking = (RateLimit(options.votes_per_minute) for _ in range(2))

    def app(self) -> FastAPI:
        app = FastAPI(
            title="rlhf_ray",
            version=version("rlhf_ray"),
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
            redirect_slashes=False,
        )
        _handle_errors(app)
        describe_bodies(app, BODIES, streams=("/page/chat",))
        app.get("/page/about")(self.about)
        app.post("/page/chat")(self.chat)
        app.post("/page/comparisons", response_model=ShownComparison)(self.ask)
        app.get("/page/comparisons/{comparison}", response_model=ShownComparison)(self.comparison)
        app.post("/page/votes", response_model=VoteAnswer)(self.vote)
        app.get("/page/votes")(self.votes)
        app.get("/page/results")(self.results)
        app.post("/page/playground")(self.playground)
        return app

    async def about(self, request: Request) -> dict[str, Any]:
        """What the server has, and who asks. `rater` is the invited rater whose token came with the request."""
        rater = await self.raters.check(request)
        return {
            "models": [{"name": card.called, "chat": card.chat} for card in await self.models.choices()],
            "votes": self.store is not None,
            "prompts": len(self.prompts),
            "invited_only": self.raters.invited_only,
            "rater": rater,
            "reward": self.options.reward_url is not None,
        }

    async def chat(self, request: Request) -> Response:
        """Talk to one model. A model without a chat template gets the last message alone, as its prompt."""
        await self.raters.check(request)
        body = await _read(request, ChatBody)
        (card,) = await self.models.cards_of([body.model])
        prompt: Prompt = body.messages
        if not card.chat:
            last = body.messages[-1].get("content")
            if not isinstance(last, str) or not last:
                raise bad_request("The last message has no text.", param="messages")
            prompt = self.models.own_prompt(last, [card])
        path, asked = request_for(prompt, card)
        sampling = {"temperature": body.temperature, "max_tokens": body.max_tokens}
        return RelayedAnswer(self.models.front, path, asked | sampling | {"stream": True}, card.version)

    async def ask(self, request: Request) -> ShownComparison:
        """A comparison to judge: one that waits for this rater, or two new answers, which may take a while."""
        self._has_votes()
        assert self.comparing is not None
        body = await _read(request, ComparisonRequest)
        rater = await self.raters.rater(request, body.rater)
        self.asking.take(rater)
        try:
            return await while_connected(request.receive, self.comparing.next(rater, body))
        except ClientLeft:
            raise ApiError(499, "The client has left.") from None  # nobody reads it

    async def comparison(
        self, request: Request, comparison: str, rater: Annotated[Name | None, Query()] = None
    ) -> ShownComparison:
        """A comparison that this rater was shown, as it was shown, with the rater's vote."""
        store = self._has_votes()
        name = await self.raters.rater(request, rater)
        showing, vote = await asyncio.to_thread(store.shown_before, comparison, name)
        told = None if vote is None else {
            "choice": vote.choice, "rating": vote.rating, "reason": vote.reason, "edit_of": vote.edit_of, "edit": vote.edit,
            "flag": vote.flag,
        }  # fmt: skip
        return shown(showing, told)

    async def vote(self, request: Request) -> VoteAnswer:
        """Vote on a comparison that this rater was shown. Sent again it counts once; saying something else is refused (409)."""
        store = self._has_votes()
        body = await _read(request, VoteRequest)
        rater = await self.raters.rater(request, body.rater)
        self.voting.take(rater)
        vote = Vote(rater=rater, **body.model_dump(exclude={"rater", "replace"}))
        receipt = await asyncio.to_thread(store.replace if body.replace else store.vote, vote)
        showing, _ = await asyncio.to_thread(store.shown_before, vote.comparison, rater)
        left, right = (Writer(model=each.model, version=each.version) for each in (showing.left, showing.right))
        return VoteAnswer(
            new=receipt.new, choice=receipt.vote.choice, voted_at=receipt.voted_at, left=left, right=right
        )  # fmt: skip

    async def votes(self, request: Request, asked: Annotated[VoteList, Query()]) -> dict[str, Any]:
        """The votes, the newest first, each with its prompt and both answers and who wrote them."""
        self._has_votes()
        assert self.found is not None
        rater = await self.raters.check(request)
        if rater is not None:
            asked = asked.model_copy(update={"open_to": rater})
        return await self.found.read(self.found.votes, asked)

    async def results(self, request: Request, asked: Annotated[ResultFilters, Query()]) -> dict[str, Any]:
        """Counts, agreement, scores and win rates with 95 % intervals, as `rlhf-ray votes summary --json` prints them."""
        self._has_votes()
        assert self.found is not None
        await self.raters.check(request)
        return await self.found.read(self.found.summary, asked)

    async def playground(self, request: Request) -> dict[str, Any]:
        """Answers token by token: log-probs, those of a reference, and rewards where the server knows a reward model."""
        await self.raters.check(request)
        body = await _read(request, PlaygroundBody)
        try:
            return await while_connected(
                request.receive, playground.answers(self.models, self.options.reward_url, body)
            )
        except ClientLeft:
            raise ApiError(499, "The client has left.") from None  # nobody reads it

    def _has_votes(self) -> VoteStore:
        if self.store is None:
            raise ApiError(
                404, "This server keeps no votes; start it with --votes FILE to let people vote.", code="no_votes"
            )
        return self.store


async def _read(request: Request, kind: type) -> Any:
    return parse(kind, request.headers.get("content-type", ""), await request.body())


def _handle_errors(app: FastAPI) -> None:
    install_error_handlers(app, PATHS)

    @app.exception_handler(RequestValidationError)
    async def query(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = str(first["loc"][-1])
        return bad_request(
            f"Invalid value for '{param}': {said(first)}.", param=param, code="invalid_value"
        ).response()

    @app.exception_handler(VoteRefused)
    async def refused(request: Request, error: VoteRefused) -> JSONResponse:
        status, code = (404, "unknown_comparison") if isinstance(error, UnknownComparison) else (409, "vote_refused")
        return JSONResponse(error_body(status, f"{error}.", code=code), status_code=status)

    @app.exception_handler(RunFailed)
    async def failed(request: Request, error: RunFailed) -> JSONResponse:
        # Its words name the database; they are for the server's terminal.
        body = error_body(503, "The database of votes did not answer. Send the same request again.", code="unavailable")
        return JSONResponse(body, status_code=503, headers={"Retry-After": "1"})

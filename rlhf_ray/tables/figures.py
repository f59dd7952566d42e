"""Figures of the evaluation: what is measured of each model's responses, and how report, terminal and pages call it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from rlhf_ray.tables.table import Table, loaded

if TYPE_CHECKING:
    from rlhf_ray.evaluation.estimates import Estimate
    from rlhf_ray.evaluation.evidence import Evidence

Better = Literal[1, -1, 0]  # which direction is better; 0: neither


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure, with its 95 % interval, of every model that the evaluation draws from."""

    name: str  # its key in summary.json
    #: of what is known of one model's responses; None where it can't be measured
    measure: Callable[[Evidence], Estimate | None] | str
    label: str  # in the report
    unit: str  # or a few words on what it is, below the label
    definition: str = ""  # in summary.json
    better: Better = 0
    percent: bool = False
    ratio: bool = False  # the tuned model's is divided by the SFT model's, too
    short: str | None = None  # in the closing table and on the pages of results; None: not there
    absent: str = ""  # why it is null where it can't be measured, in summary.json

    def estimate(self, evidence: Evidence) -> Estimate | None:
        return loaded(self.measure)(evidence)


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureGroup:
    """Figures that the recipe names: their keys are name + '/' + what the recipe calls them."""

    name: str
    measure: Callable[[Evidence], Mapping[str, Estimate]] | str
    label: str  # with {} for the recipe's name
    unit: str
    definition: str = ""
    better: Better = 0
    short: str | None = None  # with {}, too
    after: str  # the figure that they follow

    def estimates(self, evidence: Evidence) -> dict[str, Estimate]:
        return {f"{self.name}/{name}": each for name, each in loaded(self.measure)(evidence).items()}

    def figure(self, key: str) -> Figure:
        """How one of them is shown."""
        name = key.partition("/")[2].replace("_", " ") if self.short is not None else key.partition("/")[2]
        return Figure(
            name=key, measure=_nothing, label=self.label.format(name), unit=self.unit, better=self.better,
            short=None if self.short is None else self.short.format(name),
        )  # fmt: skip


_HERE = "rlhf_ray.evaluation.measures"
FIGURES: Table[Figure] = Table(
    "a figure",
    Figure(
        name="score", measure=f"{_HERE}:score", label="Reward-model score", unit="deviations of the SFT model's scores",
        better=1, short="reward-model score",
        definition="The reward's score of a response: (raw - mean) / deviation of the reward model, or the reward function's "
        "own value. EOS is scored only where the response ended by itself.",
    ),
    Figure(
        name="disagreement", measure=f"{_HERE}:disagreement", label="Disagreement",
        unit="deviation over the ensemble's reward models", short="disagreement of the reward models",
        definition="Deviation of the normalised scores of an ensemble's reward models for a response, mean over responses.",
    ),
    Figure(
        name="score_length_corr", measure=f"{_HERE}:score_length_corr", label="Score with length",
        unit="correlation over responses",
        definition="Pearson correlation of the score with the length of the response over all responses.",
    ),
    Figure(
        name="judge", measure=f"{_HERE}:judge", label="Judge's score", unit="independent of the reward model", better=1,
        short="judge's score", absent="The recipe has no independent judge (`judge` or `evaluation.judge_function`).",
        definition="The same under the independent judge, a model trained on data that the reward model never saw, or the "
        "known true utility.",
    ),
    Figure(
        name="judge_positive", measure=f"{_HERE}:judge_positive", label="Judged positive",
        unit="share above the recipe's threshold", better=1, percent=True, short="share the judge calls positive",
        definition="Share of responses with a raw judge's score above evaluation.judge_positive_above.",
    ),
    Figure(
        name="perplexity", measure=f"{_HERE}:perplexity", label="Perplexity, SFT model",
        unit="of the responses given their prompts", ratio=True, short="perplexity, SFT model",
        definition="exp of the mean negative log-prob of a token of the responses given their prompts, under the SFT "
        "model at temperature 1, over all tokens of all responses.",
    ),
    Figure(
        name="perplexity_independent", measure=f"{_HERE}:perplexity_independent", label="Perplexity, independent model",
        unit="a separately seeded language model", better=-1, ratio=True, short="perplexity, separate model",
        absent="The recipe has no separately seeded language model (`fluency`).",
        definition="The same under a language model trained from another seed, in its own tokenizer.",
    ),
    Figure(
        name="perplexity_other_text", measure=f"{_HERE}:perplexity_other_text", label="Perplexity of other text",
        unit="under the model itself", better=-1, ratio=True, short="perplexity of other text",
        definition="exp of the mean negative log-prob of a token of the texts of data.other_text under the model itself (replies "
        "given their prompts, plain text from its second token on, at most 256 tokens of each): what tuning cost elsewhere. Its "
        "interval resamples texts.",
    ),
    Figure(
        name="relevance", measure=f"{_HERE}:relevance", label="Relevance", unit="nats per token, own prompt against another's",
        better=1, short="relevance, nats per token",
        absent="All held-out prompts are equal, so there is no other prompt to compare with.",
        definition="Log-prob of the responses given their own prompts minus that given other held-out prompts (a seeded "
        "shuffle), divided by their tokens: nats per token, 0 for responses that ignore their prompt.",
    ),
    Figure(
        name="retrieval_accuracy", measure=f"{_HERE}:retrieval_accuracy", label="Own prompt likelier",
        unit="share of responses; 50 % is chance", better=1, percent=True,
        definition="Share of responses that are likelier after their own prompt than after the other one.",
    ),
    Figure(
        name="length", measure=f"{_HERE}:length", label="Length", unit="tokens, EOS included", ratio=True, short="tokens",
        definition="Tokens of a response, EOS included.",
    ),
    Figure(
        name="eos_rate", measure=f"{_HERE}:eos_rate", label="Ended by itself", unit="share of responses", better=1,
        percent=True, short="ended by itself",
        definition="Share of responses that ended by EOS or a stop string before max_new_tokens.",
    ),
    Figure(
        name="distinct_1", measure=f"{_HERE}:distinct_1", label="Distinct-1", unit="different words / all words", better=1,
        ratio=True,
    ),
    Figure(
        name="distinct_2", measure=f"{_HERE}:distinct_2", label="Distinct-2", unit="different word pairs / all pairs",
        better=1, ratio=True, short="distinct-2",
        definition="Different pairs of neighbouring words divided by all pairs, over all responses together (words: "
        "lower case, punctuation apart); distinct_1 and distinct_3 likewise. Compares only equally many "
        "responses of like length.",
    ),
    Figure(
        name="distinct_3", measure=f"{_HERE}:distinct_3", label="Distinct-3", unit="different word triples / all triples",
        better=1, ratio=True,
    ),
    Figure(
        name="repetition", measure=f"{_HERE}:repetition", label="Repetition", unit="4-grams said before in the same response",
        better=-1, percent=True, short="repetition",
        definition="Mean share of a response's 4-grams of words that stood in it before.",
    ),
)  # fmt: skip
BUILT_IN = frozenset(FIGURES)
GROUPS: Table[FigureGroup] = Table(
    "a group of figures",
    FigureGroup(
        name="score", measure=f"{_HERE}:terms", label="Reward “{}”", unit="before its weight", after="score",
    ),
    FigureGroup(
        name="trait", measure=f"{_HERE}:traits", label="Trait: {}", unit="by the recipe's trait function", better=1,
        short="{}", after="judge",
        definition="trait/NAME: mean over the responses of what evaluation.trait_function says of them under that name.",
    ),
)  # fmt: skip


def definitions() -> dict[str, str]:
    return {entry.name: entry.definition for entry in (*FIGURES.values(), *GROUPS.values()) if entry.definition}


def shown_as() -> dict[str, dict[str, Any]]:
    """How the figures of plugins are shown, for summary.json: who reads that may not have imported the plugins."""
    own = [figure for name, figure in FIGURES.items() if name not in BUILT_IN]
    return {
        each.name: {"label": each.label, "unit": each.unit, "better": each.better, "percent": each.percent, "short": each.short}
        for each in own
    }


def shown_figures(keys: Iterable[str], recorded: Mapping[str, Mapping[str, Any]] = MappingProxyType({})) -> list[Figure]:
    """The figures with these keys in the table's order, those of a group after their figure, at last those that are not in
    the table but `recorded` (`shown_as`). Other keys are left out."""
    given = list(keys)
    found: list[Figure] = []
    for name, figure in FIGURES.items():
        found += [figure] if name in given else []
        for group in GROUPS.values():
            if group.after == name:
                found += [group.figure(key) for key in given if key.startswith(f"{group.name}/")]
    others = [name for name in given if name in recorded and name not in FIGURES]
    return found + [Figure(name=name, measure=_nothing, **recorded[name]) for name in others]


def _nothing(evidence: Evidence) -> None:
    """The measure of a figure that is only shown."""

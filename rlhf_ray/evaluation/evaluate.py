"""SFT model against PPO and DPO model on held-out prompts: summary.json, samples.jsonl.   P prompts, S seeds, N = P * S.

One process, one model in memory at a time (two for the KL). Every figure stands with its 95 % bootstrap interval over
prompts; what can't be measured is null, and `missing` says why.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np
import torch

from rlhf_ray.config import Precision, Recipe
from rlhf_ray.data.store import check_columns, read_prompt_columns, read_prompts
from rlhf_ray.errors import UserError
from rlhf_ray.evaluation import estimates as metrics
from rlhf_ray.evaluation.estimates import Estimate, Resampler
from rlhf_ray.evaluation.samples import Responses, draw_responses, write_samples
from rlhf_ray.evaluation.scoring import LanguageModel, sft_model, stage_model
from rlhf_ray.evaluation.traits import PREFIX, trait_scores
from rlhf_ray.models.load import load_causal_lm
from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.rewards.from_recipe import judge_scorer, reward_scorer
from rlhf_ray.rewards.scorer import RewardScorer, Scorer
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.storage import write_atomically
from rlhf_ray.training.precision import resolve_precision

FIGURES = (
    "score",
    "disagreement",
    "score_length_corr",
    "judge",
    "judge_positive",
    "perplexity",
    "perplexity_independent",
    "relevance",
    "retrieval_accuracy",
    "length",
    "eos_rate",
    "distinct_1",
    "distinct_2",
    "distinct_3",
    "repetition",
)
RATIOS = ("perplexity", "perplexity_independent", "length", "distinct_1", "distinct_2", "distinct_3")
DEFINITIONS = {
    "score": "The reward's score of a response: (raw - mean) / deviation of the reward model, or the reward function's "
    "own value. EOS is scored only where the response ended by itself.",
    "disagreement": "Deviation of the normalised scores of an ensemble's reward models for a response, mean over responses.",
    "score_length_corr": "Pearson correlation of the score with the length of the response over all responses.",
    "judge": "The same under the independent judge, a model trained on data that the reward model never saw, or the "
    "known true utility.",
    "judge_positive": "Share of responses with a raw judge's score above evaluation.judge_positive_above.",
    "trait": "trait/NAME: mean over the responses of what evaluation.trait_function says of them under that name.",
    "win_rate": "Share of (prompt, seed) pairs in which PPO's response scores higher than SFT's; a tie counts half.",
    "perplexity": "exp of the mean negative log-prob of a token of the responses given their prompts, under the SFT "
    "model at temperature 1, over all tokens of all responses.",
    "perplexity_independent": "The same under a language model trained from another seed, in its own tokenizer.",
    "relevance": "Log-prob of the responses given their own prompts minus that given other held-out prompts (a seeded "
    "shuffle), divided by their tokens: nats a token, 0 for responses that ignore their prompt.",
    "retrieval_accuracy": "Share of responses that are likelier after their own prompt than after the other one.",
    "length": "Tokens of a response, EOS included.",
    "eos_rate": "Share of responses that ended by EOS or a stop string before max_new_tokens.",
    "distinct_2": "Different pairs of neighbouring words divided by all pairs, over all responses together (words: "
    "lower case, punctuation apart); distinct_1 and distinct_3 likewise. Compares only equally many "
    "responses of like length.",
    "repetition": "Mean share of a response's 4-grams of words that stood in it before.",
    "kl": "Log-prob under PPO minus log-prob under SFT, summed over the tokens of PPO's responses, at the sampling "
    "temperature without truncation: nats a response.",
    "intervals": "95 % percentile bootstrap over prompts. Every figure uses the same resamples, so `difference` (PPO - "
    "SFT) and `ratio` (PPO / SFT) are paired.",
}
DPO_DEFINITIONS = {
    "dpo_over_sft": "win_rate, kl, difference and ratio as above, of DPO's model and responses in place of PPO's.",
    "ppo_over_dpo": "Share of (prompt, seed) pairs in which PPO's response scores higher than DPO's; a tie counts half.",
}
Progress = Callable[[dict], None]


def evaluate(
    recipe: Recipe, folder: RunFolder, progress: Progress | None = None, *, device: torch.device | str = "cpu"
) -> dict:
    """Run the stage, or return its summary if it is done. progress gets {"stage", "step", "total", "doing"}."""
    stage = folder.stage("evaluation")
    if stage.done:
        return stage.summary()
    started = time.monotonic()
    check_columns(recipe, folder)
    summary = _Evaluation(recipe, folder, progress or (lambda state: None), torch.device(device)).run()
    summary["seconds"] = round(time.monotonic() - started, 1)
    write_atomically(stage.path / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    stage.finish(summary)
    return summary


class _Evaluation:
    def __init__(self, recipe: Recipe, folder: RunFolder, progress: Progress, device: torch.device):
        self.recipe, self.folder, self.progress = recipe, folder, progress
        self.device = device
        self.dtype = _dtype(recipe.ppo.precision, device)
        self.seeds = recipe.evaluation.seeds
        self.prompts, self.columns = held_out_prompts(recipe, folder)
        self.repeated = [prompt for prompt in self.prompts for _ in self.seeds]  # [N]
        self.repeated_columns = {name: [value for value in each for _ in self.seeds] for name, each in self.columns.items()}
        self.missing: dict[str, str] = {}
        self.tuned = ("ppo",) if recipe.dpo is None else ("ppo", "dpo")
        self.estimates: dict[str, dict[str, Estimate]] = {name: {} for name in ("sft", *self.tuned)}
        self.resampler = Resampler(len(self.prompts), recipe.evaluation.bootstrap, recipe.seed)

    def run(self) -> dict:
        sft = self._load(sft_model(self.recipe, self.folder))
        responses, kl = {"sft": self._draw("sft", sft)}, {}
        for name in self.tuned:
            model = self._load(stage_model(self.folder, name))
            responses[name] = self._draw(name, model)
            self._report("language-model figures", 0, 1)
            kl[name] = self._kl(model, sft, responses[name])
            del model  # before the next one is loaded
        self._texts(responses)
        scores = self._scores(responses)
        for name, traits in self._traits(responses).items():
            scores[name] |= traits
        self._fluency(sft, responses)
        path = self.folder.stage("evaluation").path / "samples.jsonl"
        write_samples(path, self.prompts, self.seeds, responses, scores)
        return self._summary(kl, scores)

    def _load(self, path) -> LanguageModel:
        trust = self.recipe.model.trust_remote_code
        tokenizer = load_tokenizer(path, trust)
        return LanguageModel(load_causal_lm(path, self.dtype, trust).to(self.device), tokenizer, self.dtype, path)

    def _draw(self, name: str, model: LanguageModel) -> Responses:
        cfg = self.recipe.generation
        return draw_responses(
            model.model,
            model.tokenizer,
            self.prompts,
            self.seeds,
            cfg.sampling,
            chunk_size=cfg.chunk_size,
            device=self.device,
            engine=cfg.engine,
            folder=model.folder,
            trust_remote_code=self.recipe.model.trust_remote_code,
            progress=lambda drawn: self._report(f"{name.upper()} samples", drawn, len(self.repeated)),
        )

    def _kl(self, tuned: LanguageModel, sft: LanguageModel, drawn: Responses) -> Estimate:
        temperature = self.recipe.generation.temperature
        ours, theirs = (model.rate_tokens(drawn.prompt_ids, drawn.response_ids, temperature) for model in (tuned, sft))
        return self.resampler.mean(self._table(ours - theirs))

    def _texts(self, responses: dict[str, Responses]) -> None:
        for name, drawn in responses.items():
            out, texts = (
                self.estimates[name],
                [drawn.texts[i : i + len(self.seeds)] for i in range(0, len(drawn.texts), len(self.seeds))],
            )
            out["length"] = self.resampler.mean(self._table(drawn.lengths))
            out["eos_rate"] = self.resampler.mean(self._table(drawn.ended))
            out |= {f"distinct_{n}": self.resampler.distinct(texts, n) for n in (1, 2, 3)}
            out["repetition"] = self.resampler.mean([[metrics.repetition(text) for text in row] for row in texts])

    def _scores(self, responses: dict[str, Responses]) -> dict[str, dict[str, np.ndarray | None]]:
        scores: dict[str, dict[str, np.ndarray | None]] = {name: {} for name in responses}
        for key, make in (("score", reward_scorer), ("judge", judge_scorer)):
            self._report(key, 0, 1)
            scorer = make(self.recipe, self.folder, self.dtype, self.device)
            for name, drawn in responses.items():
                scores[name][key] = None if scorer is None else self._score(scorer, drawn, name, key)
            threshold = self.recipe.evaluation.judge_positive_above
            if key == "judge" and scorer is not None and threshold is not None:
                # Models give normalised scores, the threshold is on their raw scale; a function has only one.
                mean, std = (scorer.mean, scorer.std) if isinstance(scorer, RewardScorer) else (0.0, 1.0)
                for name in responses:
                    positive = scores[name][key] * std + mean > threshold
                    self.estimates[name]["judge_positive"] = self.resampler.mean(self._table(positive))
        if scores["sft"]["judge"] is None:
            self.missing["judge"] = "The recipe has no independent judge (`judge` or `evaluation.judge_function`)."
        return scores

    def _traits(self, responses: dict[str, Responses]) -> dict[str, dict[str, np.ndarray]]:
        """model -> trait/NAME -> [N], where the recipe has a trait function; their means become estimates."""
        path = self.recipe.evaluation.trait_function
        if path is None:
            return {}
        self._report("traits", 0, 1)
        found = {}
        for name, drawn in responses.items():
            traits = trait_scores(path, self.repeated, drawn.texts)
            found[name] = {PREFIX + trait: values for trait, values in traits.items()}
            self.estimates[name] |= {key: self.resampler.mean(self._table(part)) for key, part in found[name].items()}
        return found

    def _score(self, scorer: Scorer, drawn: Responses, name: str, key: str) -> np.ndarray:
        """The model's scores [N]; their means, and what else there is to say of PPO's score, become estimates."""
        out = self.estimates[name]
        scores = scorer.score(self.repeated, drawn.texts, drawn.ended.tolist(), self.repeated_columns)
        out[key] = self.resampler.mean(self._table(scores.total))
        if key == "score":
            correlation = self.resampler.correlation(self._table(scores.total), self._table(drawn.lengths))
            if correlation.figure() is not None:  # responses of one length have none
                out["score_length_corr"] = correlation
            out |= {term_key(term): self.resampler.mean(self._table(part)) for term, part in scores.terms.items()}
            if scores.disagreement is not None:
                out["disagreement"] = self.resampler.mean(self._table(scores.disagreement))
        return scores.total

    def _fluency(self, sft: LanguageModel, responses: dict[str, Responses]) -> None:
        self._report("perplexity", 0, 1)
        own = {}
        for name, drawn in responses.items():
            own[name] = sft.rate_tokens(drawn.prompt_ids, drawn.response_ids)
            self.estimates[name]["perplexity"] = self.resampler.perplexity(
                self._table(own[name]), self._table(drawn.lengths)
            )
        if self.recipe.fluency is None:
            self.missing["perplexity_independent"] = "The recipe has no separately seeded language model (`fluency`)."
            self._relevance(sft, responses, own)
            return
        independent = self._load(stage_model(self.folder, "fluency"))
        for name, drawn in responses.items():
            prompt_ids, response_ids = independent.encode(self.repeated, drawn)
            own[name] = independent.rate_tokens(prompt_ids, response_ids)
            self.estimates[name]["perplexity_independent"] = self.resampler.perplexity(
                self._table(own[name]), self._table([len(ids) for ids in response_ids])
            )
        self._relevance(independent, responses, own)

    def _relevance(self, model: LanguageModel, responses: dict[str, Responses], own: dict[str, np.ndarray]) -> None:
        """own: the responses' summed log-probs given their own prompts under `model`."""
        self._report("relevance", 0, 1)
        if len(set(self.prompts)) < 2:
            self.missing["relevance"] = "All held-out prompts are equal, so there is no other prompt to compare with."
            return
        partners = metrics.shuffled_partners(self.prompts, self.recipe.seed)
        other_prompts = [self.prompts[partner] for partner in partners for _ in self.seeds]
        for name, drawn in responses.items():
            prompt_ids, response_ids = model.encode(other_prompts, drawn)
            if self.recipe.fluency is None:
                response_ids = drawn.response_ids  # the sampled ids themselves, as in `own`
            other = model.rate_tokens(prompt_ids, response_ids)
            tokens = self._table([len(ids) for ids in response_ids])
            self.estimates[name]["relevance"] = self.resampler.ratio(self._table(own[name] - other), tokens)
            self.estimates[name]["retrieval_accuracy"] = self.resampler.mean(
                self._table(metrics.win_rate(own[name], other))
            )

    def _wins(self, ours: dict[str, np.ndarray | None], theirs: dict[str, np.ndarray | None]) -> dict:
        """The win rate under each scorer; null for one that is not there."""
        return {
            key: None
            if ours[scorer] is None
            else self.resampler.mean(self._table(metrics.win_rate(ours[scorer], theirs[scorer]))).figure()
            for key, scorer in (("reward_model", "score"), ("judge", "judge"))
        }

    def _figures(self) -> tuple[str, ...]:
        traits = dict.fromkeys(key for out in self.estimates.values() for key in out if key.startswith(PREFIX))
        return (*FIGURES, *map(term_key, self.recipe.ppo.rewards), *traits)

    def _over_sft(self, name: str, kl: dict[str, Estimate], scores: dict[str, dict[str, np.ndarray | None]]) -> dict:
        """How far the tuned model has gone from the SFT model, and what it gained."""
        sft, tuned = self.estimates["sft"], self.estimates[name]
        keys = self._figures()
        return {
            "win_rate": self._wins(scores[name], scores["sft"]),
            "kl": kl[name].point,
            "kl_interval": kl[name].figure(),
            "difference": {key: (tuned[key] - sft[key]).figure() for key in keys if key in sft and key in tuned},
            "ratio": {key: (tuned[key] / sft[key]).figure() for key in RATIOS if key in sft},
        }

    def _summary(self, kl: dict[str, Estimate], scores: dict[str, dict[str, np.ndarray | None]]) -> dict:
        dpo, definitions = {}, DEFINITIONS
        if "dpo" in self.tuned:
            dpo["dpo_over_sft"] = self._over_sft("dpo", kl, scores)
            dpo["ppo_over_dpo"] = {"win_rate": self._wins(scores["ppo"], scores["dpo"])}
            definitions = DEFINITIONS | DPO_DEFINITIONS
        keys = self._figures()
        model = "the separately seeded language model" if self.recipe.fluency else "the SFT model"
        return {
            **{
                name: {key: out[key].figure() if key in out else None for key in keys}
                for name, out in self.estimates.items()
            },
            **self._over_sft("ppo", kl, scores),
            **dpo,
            "max_kl": self.recipe.evaluation.max_kl,
            "prompts": len(self.prompts),
            "seeds": list(self.seeds),
            "sampling": self.recipe.generation.model_dump(mode="json"),
            "reward": reward_in_words(self.recipe),
            "judge_is": self.recipe.evaluation.judge_function or ("judge model" if self.recipe.judge else None),
            "definitions": definitions | {"relevance": f"{DEFINITIONS['relevance']} Under {model}."},
            "missing": self.missing,
        }

    def _table(self, values) -> np.ndarray:
        """[N] -> [P, S]."""
        return np.asarray(values).reshape(len(self.prompts), len(self.seeds))

    def _report(self, doing: str, step: int, total: int) -> None:
        self.progress({"stage": "evaluation", "doing": doing, "step": step, "total": total})


def term_key(name: str) -> str:
    """The figure of one of several rewards."""
    return f"score/{name}"


def reward_in_words(recipe: Recipe) -> str:
    """What PPO was rewarded by."""
    ppo, members = recipe.ppo, 1 if recipe.reward is None else recipe.reward.members
    if ppo.rewards:
        return " + ".join(f"{term.weight:g} {name}" for name, term in ppo.rewards.items())
    if ppo.reward_function is not None:
        return ppo.reward_function
    return "reward model" if members == 1 else f"{members} reward models ({recipe.reward.combine})"


def held_out_prompts(recipe: Recipe, folder: RunFolder) -> tuple[list[str], dict[str, list]]:
    """(prompts, their other columns): `evaluation.prompts` of the held-out ones (or all there are), drawn by the recipe's
    seed, in their order."""
    prompts = read_prompts(folder, "eval_prompts")
    if not prompts:
        raise UserError(f"{folder.data('eval_prompts')} holds no prompts; set data.eval_prompts or give more prompts")
    chosen = sorted(np.random.default_rng(recipe.seed).permutation(len(prompts))[: recipe.evaluation.prompts].tolist())
    return [prompts[i] for i in chosen], read_prompt_columns(folder, "eval_prompts").of(chosen)


def _dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """As in training, but for auto on a CPU: float32 there, where an evaluation is short and its figures are exact."""
    return torch.float32 if precision == "auto" and device.type == "cpu" else resolve_precision(precision, device)

"""SFT model against PPO and DPO model on held-out prompts: summary.json, samples.jsonl.   P prompts, S seeds, N = P * S.

One process, one model in memory at a time (two for the KL). Every figure stands with its 95 % bootstrap interval over
prompts; what can't be measured is null, and `missing` says why.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import numpy as np
import torch

from rlhf_ray.config import Precision, Recipe
from rlhf_ray.config.run_names import names_of
from rlhf_ray.config.stage_table import tuned_stages
from rlhf_ray.data.role_files import PromptColumns, check_columns, has_role, read_prompt_columns, read_role
from rlhf_ray.errors import UserError
from rlhf_ray.evaluation.definitions import COMPARISONS, of_tuned_stage
from rlhf_ray.evaluation.estimates import Estimate, Resampler, shuffled_partners
from rlhf_ray.evaluation.evidence import Evidence, Rated
from rlhf_ray.evaluation.held_out_votes import agreement_with_votes
from rlhf_ray.evaluation.kept import KeptParts, inputs_of
from rlhf_ray.evaluation.samples import draw_responses, write_samples
from rlhf_ray.evaluation.scoring import LanguageModel, rate_texts, sft_model, stage_model
from rlhf_ray.evaluation.traits import all_trait_scores
from rlhf_ray.evaluation.wins import wins_over
from rlhf_ray.messages import Scores
from rlhf_ray.models.control_tokens import shown
from rlhf_ray.models.float_head import logits_in_float32
from rlhf_ray.models.load import load_causal_lm, to_device
from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.rewards.answers import score_answers
from rlhf_ray.rewards.finite_scores import check_scores
from rlhf_ray.rewards.from_recipe import judge_scorer, reward_in_words, reward_scorer
from rlhf_ray.rewards.scorer import RewardScorer, Scorer
from rlhf_ray.rewards.standing import standings
from rlhf_ray.roles.rollout_text import answers_of
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.storage import write_atomically
from rlhf_ray.tables.figures import FIGURES, GROUPS, definitions, shown_as
from rlhf_ray.training.precision import resolve_precision

Progress = Callable[[dict], None]


def evaluate(
    recipe: Recipe, folder: RunFolder, progress: Progress | None = None, *, device: torch.device | str = "cpu"
) -> dict:
    """Run the stage, or return its summary if it is done. progress gets {"stage", "step", "total", "doing"}."""
    stage = folder.stage("evaluation")
    if stage.done:
        return stage.summary()
    started = time.monotonic()
    check_columns(recipe, folder, ("eval_prompts",))
    evaluation = _Evaluation(recipe, folder, progress or (lambda state: None), torch.device(device))
    summary = evaluation.run()
    summary["seconds"] = round(time.monotonic() - started, 1)
    write_atomically(stage.path / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    stage.finish(summary)
    evaluation.kept.drop()
    return summary


class _Evaluation:
    """Gathers the evidence of every model, then makes figures of it (`tables.figures`)."""

    def __init__(self, recipe: Recipe, folder: RunFolder, progress: Progress, device: torch.device):
        self.recipe, self.folder, self.progress = recipe, folder, progress
        self.device = device
        self.dtype = _dtype(recipe.ppo.precision, device)
        self.seeds = recipe.evaluation.seeds
        held_out = held_out_prompts(recipe, folder)
        places = range(len(held_out))
        self.prompts, columns = held_out.prompts(places), held_out.of(places)
        self.messages = held_out.messages(places)
        self.repeated = [prompt for prompt in self.prompts for _ in self.seeds]  # [N]
        self.columns = {name: [value for value in each for _ in self.seeds] for name, each in columns.items()}
        self.tuned = tuned_stages(recipe)
        self.resampler = Resampler(len(self.prompts), recipe.evaluation.bootstrap, recipe.seed)
        self.evidence: dict[str, Evidence] = {}  # by model
        self.votes: dict | None = None  # how often the scorers agree with them
        self.kept = KeptParts(folder.evaluation_parts, inputs_of(recipe, folder))

    def run(self) -> dict:
        sft = self._load(sft_model(self.recipe, self.folder))
        self._draw("sft", sft)
        self._rate_other_text("sft", sft)
        kl = {}
        for name in self.tuned:
            model = self._load(stage_model(self.folder, name))
            self._draw(name, model)
            self._rate_other_text(name, model)
            self._report("language-model figures", 0, 1)
            kl[name] = self._kl(name, model, sft)
            del model  # before the next one is loaded
        self._scores()
        self._fluency(sft)
        path = self.folder.stage("evaluation").path / "samples.jsonl"
        responses = {name: each.responses for name, each in self.evidence.items()}
        told = {name: _told(each) for name, each in self.evidence.items()}
        write_samples(path, [shown(prompt) for prompt in self.prompts], self.messages, self.seeds, responses, told)
        return self._summary(kl, {name: estimates_of(each) for name, each in self.evidence.items()})

    def _load(self, path) -> LanguageModel:
        trust = self.recipe.model.trust_remote_code
        tokenizer = load_tokenizer(path, trust)
        model = to_device(load_causal_lm(path, self.dtype, trust), self.device)
        if self.recipe.ppo.float32_head:
            logits_in_float32(model, self.dtype)
        return LanguageModel(model, tokenizer, self.dtype, path, self.recipe.ppo.microbatches)

    def _draw(self, name: str, model: LanguageModel) -> None:
        cfg = self.recipe.generation
        drawn = draw_responses(
            model.model,
            model.tokenizer,
            self.prompts,
            self.seeds,
            cfg.sampling,
            chunk_size=cfg.chunk_size,
            device=self.device,
            engine=cfg.engine,
            decodes=cfg.rows,
            tensor_parallel=cfg.tensor_parallel if self.device.type == "cuda" else 1,
            folder=model.folder,
            trust_remote_code=self.recipe.model.trust_remote_code,
            progress=lambda drawn: self._report(f"{name.upper()} samples", drawn, len(self.repeated)),
            kept=lambda start, make: self.kept.completions(f"drawn-{name}-{start:06d}", make),
        )
        to_device(model.model, self.device)  # from where an engine that is split over several GPUs had it
        self.evidence[name] = Evidence(
            recipe=self.recipe, resampler=self.resampler, prompts=self.repeated, columns=self.columns, responses=drawn,
            tokenizer=model.tokenizer,
        )  # fmt: skip

    def _rate_other_text(self, name: str, model: LanguageModel) -> None:
        if has_role(self.folder, "other_text"):
            self._report("perplexity of other text", 0, 1)
            rows = read_role(self.folder, "other_text")
            found = self.kept.arrays(
                f"other_text-{name}", lambda: asdict(rate_texts(model, rows["prompt"], rows["response"]))
            )
            self.evidence[name].other_text = Rated(logprobs=found["logprobs"], tokens=found["tokens"])

    def _kl(self, name: str, tuned: LanguageModel, sft: LanguageModel) -> Estimate:
        temperature, drawn = self.recipe.generation.temperature, self.evidence[name].responses

        def rate(model: LanguageModel) -> np.ndarray:
            return model.rate_tokens(drawn.prompt_ids, drawn.response_ids, temperature, drawn.supports)

        ours = self.kept.array(f"kl-{name}-own", lambda: rate(tuned))
        theirs = self.kept.array(f"kl-{name}-sft", lambda: rate(sft))
        return self.resampler.mean(self._table(ours - theirs))

    def _scores(self) -> None:
        """Scores by PPO's reward, by the judge and by the trait function, where the recipe has them."""
        models = self.recipe, self.folder, self.dtype, self.device
        self._report("score", 0, 1)
        scorer = reward_scorer(*models)
        for name, each in self.evidence.items():
            each.scores = self._scored(f"score-{name}", scorer, each)
        self._report("judge", 0, 1)
        judge = judge_scorer(*models)
        if judge is not None:
            for name, each in self.evidence.items():
                each.judge = self._scored(f"judge-{name}", judge, each).total
                if isinstance(judge, RewardScorer):  # its scores are normalised; a function has only one scale
                    each.judge_scale = (judge.mean, judge.std)
        scorers = {"reward_model": scorer, "judge": judge}
        self.votes = agreement_with_votes(self.recipe, self.folder, scorers, self.evidence["sft"].tokenizer)
        paths = self.recipe.evaluation.trait_functions
        if paths:
            self._report("traits", 0, 1)
            for name, each in self.evidence.items():
                prompts = [shown(prompt) for prompt in each.prompts]
                texts, columns = each.responses.texts, each.columns
                each.traits = dict(
                    self.kept.arrays(f"traits-{name}", partial(all_trait_scores, paths, prompts, texts, columns))
                )

    def _scored(self, name: str, scorer: Scorer, each: Evidence) -> Scores:
        drawn = each.responses
        answers = answers_of(
            each.tokenizer, each.prompts, drawn.prompt_ids, drawn.response_ids, drawn.ended.tolist(),
            stop=self.recipe.generation.stop, columns=each.columns,
        )  # fmt: skip
        scores = self.kept.scores(name, lambda: score_answers(scorer, answers))
        return check_scores(scores, f"the score of {type(scorer).__name__} is", each.prompts, drawn.texts)

    def _fluency(self, sft: LanguageModel) -> None:
        self._report("perplexity", 0, 1)
        for name, each in self.evidence.items():
            drawn = each.responses
            rated = self.kept.array(f"sft-{name}", partial(sft.rate_tokens, drawn.prompt_ids, drawn.response_ids))
            each.sft = each.own = Rated(logprobs=rated, tokens=drawn.lengths)
        if self.recipe.fluency is None:
            self._relevance(sft)
            return
        independent = self._load(stage_model(self.folder, "fluency"))
        for name, each in self.evidence.items():
            prompt_ids, response_ids = independent.encode(self.repeated, each.responses)
            each.independent = each.own = Rated(
                logprobs=self.kept.array(f"independent-{name}", partial(independent.rate_tokens, prompt_ids, response_ids)),
                tokens=np.array([len(ids) for ids in response_ids]),
            )
        self._relevance(independent)

    def _relevance(self, model: LanguageModel) -> None:
        """The responses given other prompts, under the same model as `own`."""
        self._report("relevance", 0, 1)
        if len(set(self.prompts)) < 2:
            return
        partners = shuffled_partners(self.prompts, self.recipe.seed)
        other_prompts = [self.prompts[partner] for partner in partners for _ in self.seeds]
        for name, each in self.evidence.items():
            prompt_ids, response_ids = model.encode(other_prompts, each.responses)
            if self.recipe.fluency is None:
                response_ids = each.responses.response_ids  # the sampled ids themselves, as in `own`
            each.other = self.kept.array(f"relevance-{name}", partial(model.rate_tokens, prompt_ids, response_ids))

    def _over_sft(self, name: str, kl: dict[str, Estimate], found: dict[str, dict[str, Estimate]]) -> dict:
        """How far the tuned model has gone from the SFT model, and what it gained."""
        sft, tuned = found["sft"], found[name]
        both = [key for key in tuned if key in sft]
        return {
            "win_rate": wins_over(self.evidence[name], self.evidence["sft"]),
            "kl": kl[name].point,
            "kl_interval": kl[name].figure(),
            "difference": {key: (tuned[key] - sft[key]).figure() for key in both},
            "ratio": {key: (tuned[key] / sft[key]).figure() for key in both if key in FIGURES and FIGURES[key].ratio},
        }

    def _summary(self, kl: dict[str, Estimate], found: dict[str, dict[str, Estimate]]) -> dict:
        others, explained = {}, definitions() | COMPARISONS
        names = names_of(self.recipe.model_dump(mode="json"))
        for name in self.tuned[1:]:
            others[f"{name}_over_sft"] = self._over_sft(name, kl, found)
            others[f"ppo_over_{name}"] = {"win_rate": wins_over(self.evidence["ppo"], self.evidence[name])}
            explained |= of_tuned_stage(name)
        keys = list(dict.fromkeys((*FIGURES, *(key for out in found.values() for key in out))))
        model, of_plugins = "the separately seeded language model" if self.recipe.fluency else "the SFT model", shown_as()
        return {
            **{name: {key: out[key].figure() if key in out else None for key in keys} for name, out in found.items()},
            **self._over_sft("ppo", kl, found),
            **others,
            "max_kl": self.recipe.evaluation.max_kl,
            "prompts": len(self.prompts),
            "seeds": list(self.seeds),
            "sampling": self.recipe.generation.model_dump(mode="json"),
            "reward": reward_in_words(self.recipe),
            "scorers": {
                name: None if standing is None else standing.to_json()
                for name, standing in standings(self.recipe, self.folder).items()
            },
            **({} if self.votes is None else {"held_out_votes": self.votes}),
            "judge_is": self.recipe.evaluation.judge_function or ("judge model" if self.recipe.judge else None),
            "names": names.to_json(),
            "definitions": {
                name: names.told(words)
                for name, words in (explained | {"relevance": f"{explained['relevance']} Under {model}."}).items()
            },
            "missing": {name: figure.absent for name, figure in FIGURES.items() if figure.absent and name not in found["sft"]},
            **({"shown_as": of_plugins} if of_plugins else {}),
        }

    def _table(self, values) -> np.ndarray:
        """[N] -> [P, S]."""
        return np.asarray(values).reshape(len(self.prompts), len(self.seeds))

    def _report(self, doing: str, step: int, total: int) -> None:
        self.progress({"stage": "evaluation", "doing": doing, "step": step, "total": total})


def estimates_of(evidence: Evidence) -> dict[str, Estimate]:
    """Every figure that can be measured, by key."""
    found = {name: figure.estimate(evidence) for name, figure in FIGURES.items()}
    for group in GROUPS.values():
        found |= group.estimates(evidence)
    return {name: estimate for name, estimate in found.items() if estimate is not None}


def _told(evidence: Evidence) -> dict[str, np.ndarray | None]:
    """What samples.jsonl says of each response."""
    scores = None if evidence.scores is None else evidence.scores.total
    return {"score": scores, "judge": evidence.judge} | {f"trait/{name}": each for name, each in evidence.traits.items()}


def held_out_prompts(recipe: Recipe, folder: RunFolder) -> PromptColumns:
    """`evaluation.prompts` of the held-out prompts (or all there are), drawn by the recipe's seed, in their order."""
    prompts = read_prompt_columns(folder, "eval_prompts")
    if not len(prompts):
        raise UserError(f"{folder.data('eval_prompts')} holds no prompts; set data.eval_prompts or give more prompts")
    chosen = sorted(np.random.default_rng(recipe.seed).permutation(len(prompts))[: recipe.evaluation.prompts].tolist())
    return prompts.take(chosen)


def _dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """As in training, except auto on a CPU: float32 there, where an evaluation is short and its figures are exact."""
    return torch.float32 if precision == "auto" and device.type == "cpu" else resolve_precision(precision, device)

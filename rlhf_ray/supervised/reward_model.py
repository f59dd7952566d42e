"""Reward model (or independent judge) on one rank: preferences in, a one-logit classifier and its figures out.

Two objectives: pairs (Bradley-Terry, TRL's RewardTrainer) and scores (regression to people's scores, standardised).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardConfig as TrlRewardConfig
from trl import RewardTrainer

from rlhf_ray.config import Recipe, RewardConfig
from rlhf_ray.data.role_files import COLUMNS, read_role
from rlhf_ray.data.tokens import encode_texts
from rlhf_ray.errors import UserError
from rlhf_ray.models.float_head import score_in_float32
from rlhf_ray.models.frozen import hold_frozen
from rlhf_ray.models.load import body_of, build_causal_lm, build_reward_model, fast_attention, load_reward_model
from rlhf_ray.models.positions import check_positions
from rlhf_ray.models.tokenizer import load_tokenizer, pad_id
from rlhf_ray.models.trained_part import train_only_part
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.supervised.ensemble import save_scores
from rlhf_ray.supervised.lines import classify_lines
from rlhf_ray.supervised.normalisation import sample_scores, write_normalisation
from rlhf_ray.supervised.reward_metrics import heldout_figures, numbered
from rlhf_ray.supervised.rows import TokenRows, padded, pair_rows, score_rows
from rlhf_ray.supervised.stage import MeasuringJob, StageJob, device_of, measure_stage, train_stage
from rlhf_ray.supervised.stage_trainer import StageTrainer, padding_of, training_arguments

SEEDS = {"reward": 2000, "judge": 3000}  # added to the recipe's: the two must not share a head or a data order
MEMBER_SEED = 10_000  # times the member's number, likewise
ROW_MAKERS = {"pairs": pair_rows, "scores": score_rows}


class PairTrainer(StageTrainer, RewardTrainer):
    """Bradley-Terry: -log sigmoid(score(chosen) - score(rejected))."""


class ScoreTrainer(StageTrainer, RewardTrainer):
    """Regression: mean squared distance between the logit and the standardised score."""

    def _prepare_dataset(self, dataset, *_args, **_kwargs):
        return dataset  # token rows already, without the two sides that RewardTrainer looks for

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        scores = inputs["labels"]
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        loss = F.mse_loss(outputs.logits.squeeze(-1).float(), scores.float())
        return (loss, outputs) if return_outputs else loss


def train_reward(recipe: Recipe, folder: RunFolder, stage: str, member: int = 0) -> dict:
    """The stage "reward" or "judge" on this rank -> its summary (see `stage.train_stage`).

    member: which model of the stage's ensemble; they differ in the head's first weights and in the order of the data.
    """
    config = recipe.section(stage)
    assert isinstance(config, RewardConfig)
    target, tokenizer = folder.stage(stage).member(member), _tokenizer(recipe, folder, config)
    figures_seed = recipe.seed + SEEDS[stage]  # the stage's: all members are measured on the same pairs of rows
    job = _training(recipe, folder, stage, config, tokenizer, member)
    middle = standardisation(job.rows)[0] if config.objective == "scores" else 0.0

    def measure(trained: PreTrainedModel, dtype: torch.dtype) -> dict:
        figures: dict = {}
        for part in folder.heldout_parts(stage):
            held_out = _heldout(folder, stage, part, config)
            scores = heldout_scores(trained, tokenizer, held_out, config, dtype=dtype)
            found = heldout_figures(scores, seed=figures_seed, middle=middle)
            figures |= found if part == "eval" else {part.removeprefix("eval_"): found}
            if part == "eval" and config.members > 1:
                save_scores(target, scores, seed=figures_seed)
        if config.normalise_samples > 0:
            scores = sample_scores(
                recipe, folder, target.model, samples=config.normalise_samples, dtype=dtype, device=device_of(config)
            )
            figures |= write_normalisation(target.model, scores)
        return figures

    measuring = MeasuringJob(
        recipe=recipe, stage=stage, target=target, config=config, measure=measure,
        load=lambda saved: score_in_float32(load_reward_model(saved, None, recipe.model.trust_remote_code)),
    )  # fmt: skip
    jobs = [job]
    del job  # `train_stage` is to hold the only reference
    return measure_stage(train_stage(jobs.pop()), measuring)


def _training(
    recipe: Recipe, folder: RunFolder, stage: str, config: RewardConfig, tokenizer: PreTrainedTokenizerBase, member: int
) -> StageJob:
    seed, target = recipe.seed + SEEDS[stage] + MEMBER_SEED * member, folder.stage(stage).member(member)
    train = _read(folder, stage, "train", config)

    def start() -> PreTrainedModel:
        made = score_in_float32(fast_attention(_base(recipe, folder, stage, config, tokenizer, seed), device_of(config)))
        for name in ("reward_mean", "reward_std"):  # of the reward model that this one starts from
            if name in made.config.to_dict():
                delattr(made.config, name)
        return made

    model = start()
    check_positions(model.config, config.max_length, f"{stage}.max_length")
    train_only_part(
        body_of(model), lora=config.lora, freeze_layers=config.freeze_layers, seed=seed,
        gradient_checkpointing=config.gradient_checkpointing,
    )  # fmt: skip
    rows = ROW_MAKERS[config.objective](tokenizer, train, max_length=config.max_length)
    for part in folder.heldout_parts(stage):  # what can't be measured is told of before the training
        ROW_MAKERS[config.objective](tokenizer, _heldout(folder, stage, part, config), max_length=config.max_length)
    if device_of(config).type == "cpu":
        classify_lines(model)

    def trainer(dataset: Dataset, stage_folder, dtype) -> StageTrainer:
        hold_frozen(model, dtype)
        args = training_arguments(
            TrlRewardConfig, stage, config, stage_folder, dtype=dtype, seed=seed, padding=padding_of(model),
            disable_dropout=True,
        )  # fmt: skip
        if config.objective == "pairs":
            return PairTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
        mean, deviation = standardisation(rows)
        collator = ScoreCollator(pad_id(tokenizer), padding_of(model), mean=mean, deviation=deviation)
        return ScoreTrainer(
            model=model, args=args, train_dataset=dataset, processing_class=tokenizer, data_collator=collator
        )

    return StageJob(
        recipe=recipe, stage=stage, target=target, config=config, seed=seed, tokenizer=tokenizer, rows=rows,
        trainer=trainer, start=start,
    )  # fmt: skip


class ScoreCollator:
    """input_ids, score -> right-padded batch with the standardised score as its label."""

    def __init__(self, pad_token_id: int, multiple: int, *, mean: float, deviation: float):
        self.pad_token_id, self.multiple = pad_token_id, multiple
        self.mean, self.deviation = mean, deviation

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        ids, mask = padded([row["input_ids"] for row in rows], self.pad_token_id, self.multiple)
        scores = torch.tensor([row["score"] for row in rows], dtype=torch.float32)
        return {"input_ids": ids, "attention_mask": mask, "labels": (scores - self.mean) / self.deviation}


def standardisation(rows: TokenRows) -> tuple[float, float]:
    """Mean and deviation of people's scores in the training rows."""
    scores = np.asarray(rows.dataset["score"], np.float64)
    if scores.std() == 0:
        raise UserError(
            f"all {len(scores)} scores of the training data are {scores[0]:g}, so there is nothing to learn; "
            "check the data's score column"
        )
    return float(scores.mean()), float(scores.std())


def heldout_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: Dataset, config: RewardConfig,
    *, dtype: torch.dtype,
) -> dict[str, np.ndarray]:  # fmt: skip
    """The reward model's logits of held-out rows, and the lengths of the responses in tokens, EOS included: `chosen`,
    `rejected`, `chosen_lengths`, `rejected_lengths`, and `prompts`, a number for each different one; or `scores`, `human`,
    `lengths`."""
    made = ROW_MAKERS[config.objective](tokenizer, held_out, max_length=config.max_length)
    rows, held_out = made.dataset, held_out if made.used is None else held_out.select(made.used)

    def logits(column: str) -> np.ndarray:
        return raw_scores(
            model, rows[:][column], pad_token_id=pad_id(tokenizer), dtype=dtype, batch_size=config.microbatch_size
        )

    def lengths(column: str) -> np.ndarray:
        return np.array([len(ids) + 1 for ids in encode_texts(tokenizer, held_out[:][column])])

    if config.objective == "pairs":
        return {
            "chosen": logits("chosen_ids"), "rejected": logits("rejected_ids"),
            "chosen_lengths": lengths("chosen"), "rejected_lengths": lengths("rejected"),
            "prompts": numbered(held_out[:]["prompt"]),
        }  # fmt: skip
    return {"scores": logits("input_ids"), "human": np.asarray(rows["score"]), "lengths": lengths("response")}


@torch.no_grad()
def raw_scores(
    model: PreTrainedModel, rows: list, *, pad_token_id: int, dtype: torch.dtype, batch_size: int
) -> np.ndarray:
    """The model's logit at the last token of each row (its EOS): float32 [N]."""
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    scores = np.empty(len(rows), np.float32)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        ids, mask = padded([rows[place] for place in places], pad_token_id, padding_of(model))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        scores[places] = logits.squeeze(-1).float().cpu().numpy()
    return scores


def _tokenizer(recipe: Recipe, folder: RunFolder, config: RewardConfig) -> PreTrainedTokenizerBase:
    """That of the model that training starts from."""
    path = folder.tokenizer if config.starts_within_run else config.base
    return load_tokenizer(path, trust_remote_code=recipe.model.trust_remote_code)


def _base(
    recipe: Recipe, folder: RunFolder, stage: str, config: RewardConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """The model that training starts from, with a fresh head."""
    trust = recipe.model.trust_remote_code
    if not config.starts_within_run:
        return build_reward_model(config.base, tokenizer, seed, trust)
    if config.base != "model" and recipe.section(config.base) is not None:
        body = folder.stage(config.base).model
        if not (body / "config.json").exists():
            raise UserError(f"{stage}.base is '{config.base}', but {body} holds no model; run that stage first")
        return build_reward_model(body, tokenizer, seed, trust)
    return build_reward_model(build_causal_lm(recipe.model, tokenizer, recipe.seed), tokenizer, seed, trust)


def _heldout(folder: RunFolder, stage: str, part: str, config: RewardConfig) -> Dataset:
    held_out = _read(folder, stage, part, config)
    return held_out.select(range(min(config.eval_rows, len(held_out))))


def _read(folder: RunFolder, stage: str, part: str, config: RewardConfig) -> Dataset:
    data = read_role(folder, f"{stage}_{part}")
    missing = set(COLUMNS[config.objective]) - set(data.column_names)
    if missing:
        other = "scores" if config.objective == "pairs" else "pairs"
        raise UserError(
            f"{stage}.objective is '{config.objective}', but the prepared data has no column "
            f"{', '.join(sorted(missing))} (it has {', '.join(data.column_names)}); set {stage}.objective: {other}, or "
            "give data with these columns"
        )
    return data

"""The data stage: sources or a builder in; <role>.parquet, tokenizer/ and summary.json in RUN/data/ out."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from dataclasses import replace

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf_ray.config import Recipe, SftConfig
from rlhf_ray.config.columns import column_problems
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.formats import Role, detect, normalise
from rlhf_ray.data.lists import needed_lists, preference_section, prompt_origins
from rlhf_ray.data.mixing import mix, split
from rlhf_ray.data.raw_sources import Raw, read_sources, rows_of
from rlhf_ray.data.role_files import COLUMNS, OTHER_TEXT_TOKENS, kept_columns, write_role
from rlhf_ray.data.rules import RowLimits, Tally, apply_rules, drop
from rlhf_ray.data.sources import other_columns
from rlhf_ray.data.voted import HELD_OUT, WHERE, Voted, read_votes
from rlhf_ray.errors import UserError
from rlhf_ray.models.control_tokens import shown
from rlhf_ray.models.tokenizer import load_tokenizer, train_tokenizer
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.storage import write_atomically

TOKENIZER_CHARACTERS = 20_000_000  # more text hardly changes a small vocabulary, and takes minutes


def prepare(recipe: Recipe, folder: RunFolder) -> dict:
    """Run the data stage, unless it is done; returns its summary.

    The summary holds, by role, the rows written, and by source the rows read, kept, used, dropped and cut by rule.
    Raises UserError for missing or empty data, missing columns, a tokenizer without EOS.
    """
    stage = folder.stage("data")
    if stage.done:
        return stage.summary()
    started = time.monotonic()
    votes = None if recipe.data.votes is None else read_votes(recipe.data.votes)
    raw = read_sources(recipe, votes)
    tokenizer = _tokenizer(recipe, raw)
    builder = _Preparation(recipe, tokenizer, raw, votes)
    written = builder.roles()
    _check_columns(recipe, written)
    tokenizer.save_pretrained(folder.tokenizer)
    for role, (rows, columns) in written.items():
        write_role(folder, role, rows, columns)
    summary = {
        "roles": {role: {"rows": len(rows)} for role, (rows, _) in written.items()},
        "sources": builder.tallies,
        "tokenizer": {
            "origin": "trained on the SFT text" if recipe.model.is_from_scratch else recipe.model.name_or_path,
            "entries": len(tokenizer),
            "eos": tokenizer.eos_token,
            "pad": tokenizer.pad_token,
        },
        "seconds": round(time.monotonic() - started, 1),
    }
    write_atomically(stage.path / "summary.json", json.dumps(summary, indent=2) + "\n")
    stage.finish(summary)
    return summary


def _check_columns(recipe: Recipe, written: Mapping[str, tuple[list[dict], tuple[str, ...]]]) -> None:
    """UserError where a function asks for a column that the prompts lack: now, not after the models are trained."""
    problems = []
    for role in ("prompts", "eval_prompts"):
        problems += column_problems(recipe, kept_columns(written[role][0]), f"data.{role}")
    if problems:
        raise UserError("\n".join(problems))


def _tokenizer(recipe: Recipe, raw: Raw) -> PreTrainedTokenizerBase:
    model = recipe.model
    if model.is_from_scratch:
        # The recipe's template needs a tokenizer to render messages; any tokenizer will do.
        blank = train_tokenizer([], 0, model.from_scratch.architecture)
        blank.chat_template = model.chat_template
        texts = []
        for where, source, rows in raw["sft"]:
            columns = detect(rows.column_names, source.columns, "sft", where)
            normalised = normalise(rows_of(rows), columns, "sft", ChatFormat(blank))
            texts += [shown(row["prompt"] + row["response"]) for row in normalised]
        random.Random(f"tokenizer/{recipe.seed}").shuffle(texts)
        total = 0
        for count, text in enumerate(texts):
            total += len(text)
            if total > TOKENIZER_CHARACTERS:
                texts = texts[: count + 1]
                break
        tokenizer = train_tokenizer(texts, model.from_scratch.vocab_size, model.from_scratch.architecture)
    else:
        tokenizer = load_tokenizer(model.name_or_path, model.trust_remote_code)
    if model.chat_template is not None:
        tokenizer.chat_template = model.chat_template
    return tokenizer


class _Preparation:
    """Turns raw rows into the roles' rows; `tallies` counts, per source, the rows read, kept, dropped and cut."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, raw: Raw, votes: Voted | None):
        self._recipe, self._tokenizer, self._raw = recipe, tokenizer, raw
        self._others = _other_tokenizers(recipe)
        self._chat = ChatFormat(
            tokenizer, allow_special_tokens=recipe.data.allow_special_tokens, readers=list(self._others.values())
        )
        self._held_out = frozenset[str]() if votes is None else votes.held_out_keys(self._chat)
        self._notes = {} if votes is None else {WHERE: f"left out: {votes.left_out}"}
        self.tallies: dict[str, list[dict]] = {}

    def roles(self) -> dict[str, tuple[list[dict], tuple[str, ...]]]:
        """Role -> (rows, columns)."""
        recipe, written = self._recipe, {}
        sft_stage = needed_lists(recipe).get("sft")
        pool: dict[str, tuple[list[dict], list[dict]]] = {}  # training and held-out rows that prompts may come from
        if sft_stage is not None:
            section = recipe.section(sft_stage)
            section = section if isinstance(section, SftConfig) else SftConfig()
            plain_text = "packed" if section.packing else "trainer_cuts"
            limits = self._limits(self._tokenizer, section.max_length, plain_text=plain_text)
            pool["sft"] = self._train_and_eval("sft", "sft", limits)
            written["sft_train"], written["sft_eval"] = ((rows, COLUMNS["sft"]) for rows in pool["sft"])
        for name, role in (("reward", "preferences"), ("judge", "judge")):
            section = preference_section(recipe, role)
            if section is None:
                continue
            tokenizer = self._tokenizer
            if not section.starts_within_run:
                tokenizer = self._others[section.base]
            limits = self._limits(tokenizer, section.max_length, truncate_reply=section.truncate_reply)
            pool[role] = self._train_and_eval(role, section.objective, limits)
            for part, rows in zip(("train", "eval"), pool[role], strict=True):
                written[f"{name}_{part}"] = (rows, COLUMNS[section.objective])
            for extra in (given for given in self._raw if given.startswith(f"{role}_eval_")):
                rows = self._rows(extra, section.objective, limits)
                if rows:
                    written[extra.replace(role, name, 1)] = (rows, COLUMNS[section.objective])
        if "other_text" in self._raw:
            limits = self._limits(self._tokenizer, OTHER_TEXT_TOKENS, plain_text="packed")  # the evaluation cuts long texts
            written["other_text"] = (self._rows("other_text", "sft", limits), COLUMNS["sft"])
        train, held_out = self._prompts(pool)
        written["prompts"], written["eval_prompts"] = (train, COLUMNS["prompts"]), (held_out, COLUMNS["prompts"])
        return written

    def _limits(self, tokenizer: PreTrainedTokenizerBase, max_length: int, **extra) -> RowLimits:
        data = self._recipe.data
        return RowLimits(
            tokenizer=tokenizer, chat=self._chat, max_prompt_tokens=data.max_prompt_tokens,
            max_length=max_length, truncate_prompt=data.truncate_prompt, drop_duplicates=data.drop_duplicates, **extra,
        )  # fmt: skip

    def _train_and_eval(self, role: str, form: Role, limits: RowLimits) -> tuple[list[dict], list[dict]]:
        rows = self._rows(role, form, limits)
        if f"{role}_eval" in self._raw:
            return rows, self._rows(f"{role}_eval", form, limits)
        return split(rows, self._recipe.data.holdout, self._recipe.seed, f"data.{role}")

    def _rows(self, role: str, form: Role, limits: RowLimits) -> list[dict]:
        """The cleaned and mixed rows of a list of sources."""
        parts, counted = [], []
        for where, source, dataset in self._raw[role]:
            columns = detect(dataset.column_names, source.columns, form, where)
            keep = other_columns(dataset, columns) if role in prompt_origins(self._raw) else ()
            tally = Tally()
            normalised = normalise(rows_of(dataset), columns, form, self._chat, keep)
            if "eval" not in role:  # in whatever list a prompt is
                tally.read = len(normalised)
                normalised = drop(normalised, tally, "in_held_out_votes", lambda row: row["key"] in self._held_out)
                tally.read -= len(normalised)
            parts.append(apply_rules(normalised, form, limits, tally))
            if not parts[-1] and role != HELD_OUT:  # which may be few
                remedy = _remedy(tally, form, role, normalised)
                raise UserError(f"{where}: of {tally.read} rows none is left ({tally.in_words()}); {remedy}")
            counted.append((source, tally))
        rows, used = mix(parts, [source.weight for source, _ in counted], self._recipe.seed, f"data.{role}")
        for (_, tally), count in zip(counted, used, strict=True):
            if count < tally.kept:
                tally.dropped["surplus_of_mix"] += tally.kept - count
                tally.kept = count
        self.tallies[role] = [{"source": source.path, **tally.as_dict()} for source, tally in counted]
        for entry, (where, _, dataset) in zip(self.tallies[role], self._raw[role], strict=True):
            if where in self._notes:
                entry["note"] = self._notes[where]
            elif isinstance(dataset, Dataset) and dataset.info.description:  # a builder says here what it dropped itself
                entry["note"] = dataset.info.description
        return rows

    def _prompts(self, pool: dict[str, tuple[list[dict], list[dict]]]) -> tuple[list[dict], list[dict]]:
        """(training, evaluation) prompts: the given ones, else those of the preferences, else those of the SFT rows."""
        recipe = self._recipe
        limits = self._limits(self._tokenizer, recipe.data.max_prompt_tokens)
        held_out = None
        if "prompts" in self._raw:
            train = self._rows("prompts", "prompts", limits)
        elif "preferences" in self._raw and "preferences" not in pool:  # no reward model is trained on them
            train = self._rows("preferences", "prompts", limits)
        else:
            origin = "preferences" if "preferences" in pool else "sft"
            train, held_out = (self._prompts_of(rows, origin, part, limits)
                               for rows, part in zip(pool[origin], ("train", "eval"), strict=True))  # fmt: skip
        if "eval_prompts" in self._raw:
            held_out = self._rows("eval_prompts", "prompts", limits)
        elif held_out is None:
            train, held_out = split(train, recipe.data.holdout, recipe.seed, "data.prompts")
        return self._without(train, held_out), held_out

    def _prompts_of(self, rows: list[dict], origin: str, part: str, limits: RowLimits) -> list[dict]:
        tally = Tally()
        copies = [{name: row[name] for name in ("prompt", "messages", "key", "columns")} for row in rows]
        # One prompt may have many pairs, so repeated prompts are dropped whatever data.drop_duplicates says.
        prompts = apply_rules(copies, "prompts", replace(limits, drop_duplicates=True), tally)
        if not prompts:
            raise UserError(
                f"data.prompts is empty and the rows of data.{origin} hold no prompts ({tally.in_words()}); "
                "list a source of prompts"
            )
        self.tallies[f"prompts_{part}"] = [{"source": f"the {part} rows of {origin}", **tally.as_dict()}]
        return prompts

    def _without(self, train: list[dict], held_out: list[dict]) -> list[dict]:
        """Training prompts that are not evaluation prompts (two long ones may be the same once they are cut)."""
        tally, texts = Tally(), {row["prompt"] for row in held_out}
        kept = drop(train, tally, "in_eval_prompts", lambda row: row["prompt"] in texts)
        if not kept:
            raise UserError(
                "every prompt of data.prompts is an evaluation prompt too; give other eval_prompts, or none"
            )
        tally.read, tally.kept = len(train), len(kept)
        if tally.dropped:
            self.tallies["prompts_not_in_eval"] = [{"source": "the prompts that are left", **tally.as_dict()}]
        return kept


def _other_tokenizers(recipe: Recipe) -> dict[str, PreTrainedTokenizerBase]:
    """Model -> its tokenizer, of the models that read the prepared text with another one than the policy's."""
    sections = [preference_section(recipe, role) for role in ("preferences", "judge")]
    names = [section.base for section in sections if section is not None and not section.starts_within_run]
    names += [term.model for term in recipe.ppo.terms.values() if term.model not in (None, "reward")]
    return {name: load_tokenizer(name, recipe.model.trust_remote_code) for name in dict.fromkeys(names) if name is not None}


def _remedy(tally: Tally, form: Role, role: str, rows: list[dict]) -> str:
    """rows: before any was dropped"""
    roles = sorted({message["role"] for row in rows for message in row["messages"] or ()})
    refusal = next((row["refused"] for row in rows if "refused" in row), "")
    section = {"sft": "sft", "preferences": "reward", "judge": "judge"}.get(role.partition("_eval")[0], "data")
    return {
        "in_held_out_votes": "give rows of prompts that data.votes does not hold out",
        "over_long": "raise data.max_prompt_tokens"
        if form == "prompts"
        else f"raise {section}.max_length or cut the texts",
        "refused_by_template": f"the chat template says: {refusal}",
        "empty_reply": "check which columns hold the replies"
        if not roles or "assistant" in roles
        else f"a reply is a message of the role assistant, and the roles there are {', '.join(roles)}",
        "empty_prompt": "check which column holds the prompts",
        "tie": f"give pairs whose replies differ, or raise {section}.max_length where they differ beyond it",
        "no_score": "check which column holds the scores",
    }.get(tally.dropped.most_common(1)[0][0], "give other rows")

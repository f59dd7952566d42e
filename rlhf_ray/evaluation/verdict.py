"""What the evaluation's figures say, in words, and what they warn of."""

from __future__ import annotations

from rlhf_ray.config.run_names import RunNames

SCORERS = {"judge": "independent judge", "reward_model": "reward model"}  # in summary.json -> in words
MIN_DISTINCT_RATIO = 0.7
MAX_PERPLEXITY_RATIO = 1.5
MAX_LENGTH_RATIO = 1.25
MAX_LENGTH_CORRELATION = 0.5


def verdict(summary: dict, stages: list[dict]) -> str:
    """One sentence or a few. Without an evaluation: how far the run has come.

    A win rate is worth what the scorer behind it is worth: under one that is no better than chance there is no verdict.
    """
    if not summary:
        return _progress(stages)
    model, judge = summary["win_rate"]["reward_model"], summary["win_rate"]["judge"]
    name, rate, by = ("reward_model", model, "the reward model") if judge is None else ("judge", judge, "the independent judge")
    standing = standing_of(summary, name)
    doubted = standing is not None and bool(standing["problems"])
    if standing is not None and not standing["above_chance"]:
        words = f"No verdict: {by} {standing['problems'][0]}. Under it PPO wins {_rate(rate)} of comparisons"
    elif rate["low"] > 0.5:
        better = "PPO looks better than SFT: it wins" if doubted else "PPO beats SFT in"
        words = f"{better} {_rate(rate)} of comparisons under {by}"
    elif rate["high"] < 0.5:
        worse = "PPO looks worse than SFT" if doubted else "PPO made the model worse"
        words = f"{worse}: it wins only {_rate(rate)} of comparisons under {by}"
    else:
        words = f"These prompts show no difference between PPO and SFT: PPO wins {_rate(rate)} under {by}"
    if judge is not None and model is not None:
        words += f" and in {_rate(model)} under the reward model it was trained on"
    words += f", at a KL of {summary['kl']:.2f} nats per response."
    if is_above_cap(summary, summary["kl"]):
        words = f"This run failed: its KL is above the recipe's cap of {summary['max_kl']:g} nats; raise ppo.kl_coef. {words}"
    return names_in(summary).told(f"{words}{_reservations(summary, name)}")


def _reservations(summary: dict, name: str) -> str:
    """What else is wrong with the scorers that the headline speaks of."""
    found = ""
    for other, words in SCORERS.items():
        standing = standing_of(summary, other)
        if standing is None or summary["win_rate"].get(other) is None:
            continue
        # Of the one that the headline goes by, being no better than chance has been said.
        left = standing["problems"][0 if standing["above_chance"] or other != name else 1 :]
        if left:
            found += f" The {words} {' and '.join(left)}."
    return found


def standing_of(summary: dict, name: str) -> dict | None:
    """What is known of a trained scorer ("reward_model" or "judge"): see `rewards.standing`."""
    return (summary.get("scorers") or {}).get(name)


def names_in(summary: dict) -> RunNames:
    """What the run calls its algorithm, its start and its reward."""
    return RunNames(**summary.get("names", {}))


def is_above_cap(summary: dict, kl: float) -> bool:
    """Whether a policy has gone further from the SFT model than the recipe allows (evaluation.max_kl), in nats per response."""
    cap = summary.get("max_kl")
    return cap is not None and kl > cap


def warnings(summary: dict) -> list[str]:
    """What a reader should not overlook, each with its figure. That PPO's KL is above the cap, `verdict` says."""
    if not summary:
        return []
    found = _weak_scorers(summary)
    model, judge = summary["win_rate"]["reward_model"], summary["win_rate"]["judge"]
    ratio = summary.get("ratio", {})
    if judge is not None and model is not None and model["low"] > 0.5 and judge["low"] <= 0.5:
        found.append(
            "The reward model prefers PPO and the independent judge does not: PPO may be exploiting the "
            "reward model's mistakes."
        )
    dpo = summary.get("dpo_over_sft")
    if dpo is not None and is_above_cap(summary, dpo["kl"]):
        found.append(
            f"DPO's KL of {dpo['kl']:.1f} nats per response is above the recipe's cap of {summary['max_kl']:g}: "
            "raise dpo.beta."
        )
    distinct = ratio.get("distinct_2")
    if distinct is not None and distinct["mean"] < MIN_DISTINCT_RATIO:
        found.append(f"Variety fell: PPO's distinct-2 is {distinct['mean']:.2f} of SFT's (below {MIN_DISTINCT_RATIO}).")
    perplexity = ratio.get("perplexity_independent")
    if perplexity is not None and perplexity["mean"] > MAX_PERPLEXITY_RATIO:
        found.append(
            f"Fluency fell: the independent perplexity is {perplexity['mean']:.2f} times SFT's "
            f"(above {MAX_PERPLEXITY_RATIO})."
        )
    length, correlation = ratio.get("length"), length_correlation(summary)
    if length is not None and length["mean"] > MAX_LENGTH_RATIO and correlation > MAX_LENGTH_CORRELATION:
        found.append(
            f"Responses grew: PPO's are {length['mean']:.2f} times as long as SFT's (above {MAX_LENGTH_RATIO}), and the score "
            f"goes with length (correlation {correlation:.2f}, above {MAX_LENGTH_CORRELATION}): PPO may be rewarded for length."
        )
    if judge is None:
        found.append("There is no independent judge in this run: the win rate is the reward model's own opinion.")
    return [names_in(summary).told(words) for words in found]


def _weak_scorers(summary: dict) -> list[str]:
    found = []
    for name, words in SCORERS.items():
        standing = standing_of(summary, name)
        if standing is not None and standing["problems"]:
            remedy = "train it longer or on more data, or measure it on more rows"
            means = "its scores and win rates say nothing" if not standing["above_chance"] else standing["figure_in_words"]
            found.append(f"The {words} {' and '.join(standing['problems'])}: {means}; {remedy}.")
    return found


def length_correlation(summary: dict) -> float:
    """Of score and length, the larger of SFT's and PPO's.

    Where PPO has driven every response to the limit, its own lengths hardly vary and say nothing any more; SFT's still do.
    """
    found = [(summary[model].get("score_length_corr") or {}).get("mean", 0.0) for model in ("sft", "ppo")]
    return max(found)


def _rate(figure: dict) -> str:
    # No-break spaces: a number and its unit stay on one line.
    mean, low, high = (f"{100 * figure[part]:.1f}" for part in ("mean", "low", "high"))
    return f"{mean}\u00a0%" + ("" if low == high else f" ({low}\u00a0to\u00a0{high})")


def _progress(stages: list[dict]) -> str:
    done = [stage["name"] for stage in stages if stage["state"] == "done"]
    begun = [stage for stage in stages if stage["state"] == "begun"]
    words = f"Done so far: {', '.join(done)}" if done else "No stage is done yet"
    if begun:
        last = begun[-1]
        words += f"; {last['name']} has begun" + ("" if last["step"] is None else f" (step {last['step']})")
    return words + ". There is no evaluation yet."

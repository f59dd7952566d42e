"""What the evaluation's figures say, in words, and what they warn of."""

from __future__ import annotations

MIN_DISTINCT_RATIO = 0.7
MAX_PERPLEXITY_RATIO = 1.5
MAX_LENGTH_RATIO = 1.25
MAX_LENGTH_CORRELATION = 0.5


def verdict(summary: dict, stages: list[dict]) -> str:
    """One sentence. Without an evaluation: how far the run has come."""
    if not summary:
        return _progress(stages)
    model, judge = summary["win_rate"]["reward_model"], summary["win_rate"]["judge"]
    rate, by = (judge, "the independent judge") if judge is not None else (model, "the reward model")
    if rate["low"] > 0.5:
        words = f"PPO beats SFT in {_rate(rate)} of comparisons under {by}"
    elif rate["high"] < 0.5:
        words = f"PPO made the model worse: it wins only {_rate(rate)} of comparisons under {by}"
    else:
        words = f"These prompts show no difference between PPO and SFT: PPO wins {_rate(rate)} under {by}"
    if judge is not None and model is not None:
        words += f" and in {_rate(model)} under the reward model it was trained on"
    words += f", at a KL of {summary['kl']:.2f} nats per response."
    if is_above_cap(summary):
        return f"This run failed: its KL is above the recipe's cap of {summary['max_kl']:g} nats. {words}"
    return words


def is_above_cap(summary: dict) -> bool:
    """Whether the policy has gone further from the SFT model than the recipe allows (evaluation.max_kl)."""
    cap = summary.get("max_kl")
    return cap is not None and summary["kl"] > cap


def warnings(summary: dict) -> list[str]:
    """What a reader should not overlook, each with its figure."""
    if not summary:
        return []
    found = []
    model, judge = summary["win_rate"]["reward_model"], summary["win_rate"]["judge"]
    ratio = summary.get("ratio", {})
    if judge is not None and model is not None and model["low"] > 0.5 and judge["low"] <= 0.5:
        found.append(
            "The reward model prefers PPO and the independent judge does not: PPO may be exploiting the "
            "reward model's mistakes."
        )
    if is_above_cap(summary):
        found.append(
            f"The KL of {summary['kl']:.1f} nats per response is above the recipe's cap of {summary['max_kl']:g}: "
            "raise ppo.kl_coef."
        )
    dpo = summary.get("dpo_over_sft")
    if dpo is not None and summary.get("max_kl") is not None and dpo["kl"] > summary["max_kl"]:
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
    return found


def length_correlation(summary: dict) -> float:
    """Of score and length, the larger of SFT's and PPO's.

    Where PPO has driven every response to the limit, its own lengths hardly vary and say nothing any more; SFT's still do.
    """
    found = [(summary[model].get("score_length_corr") or {}).get("mean", 0.0) for model in ("sft", "ppo")]
    return max(found)


def _rate(figure: dict) -> str:
    # No-break spaces: a number and its unit stay on one line.
    return f"{100 * figure['mean']:.1f}\u00a0% ({100 * figure['low']:.1f}\u00a0to\u00a0{100 * figure['high']:.1f})"


def _progress(stages: list[dict]) -> str:
    done = [stage["name"] for stage in stages if stage["state"] == "done"]
    begun = [stage for stage in stages if stage["state"] == "begun"]
    words = f"Done so far: {', '.join(done)}" if done else "No stage is done yet"
    if begun:
        last = begun[-1]
        words += f"; {last['name']} has begun" + ("" if last["step"] is None else f" (step {last['step']})")
    return words + ". There is no evaluation yet."

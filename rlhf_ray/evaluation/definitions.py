"""What the evaluation's comparisons mean, in words for summary.json."""

#: of what is not a figure of one model; those figures are in `tables.figures`
COMPARISONS = {
    "win_rate": "Share of (prompt, seed) pairs in which PPO's response scores higher than SFT's; a tie counts half.",
    "at_equal_length": "The win rate where both responses have the same number of tokens: a logistic regression of the wins on the "
    "difference in length, read at 0 (arXiv 2404.04475). Null unless some pairs differ in each direction.",
    "kl": "Log-prob under PPO minus log-prob under SFT, summed over the tokens of PPO's responses, at the sampling "
    "temperature, both renormalised over the tokens that could be drawn (top_k, top_p, min_p): nats per response.",
    "intervals": "95 % percentile bootstrap over prompts. Every figure uses the same resamples, so `difference` (PPO - "
    "SFT) and `ratio` (PPO / SFT) are paired.",
    "held_out_votes": "Share of the held-out votes' pairs that the reward and the judge order as people do (with Wilson's 95 % "
    "interval, pairs of one prompt taken together).",
    "scorers": "How well the run's own reward model and judge tell replies apart on held-out rows: the share of pairs that they "
    "order as people do (accuracy, Wilson's 95 % interval, pairs of one prompt taken together) or the correlation with people's "
    "scores (pearson, Fisher's interval); and whether max_minutes ended their training.",
}


def of_tuned_stage(name: str) -> dict[str, str]:
    """Of what the summary says of a tuned model beside PPO's."""
    whose = f"{name.upper()}'s"
    return {
        f"{name}_over_sft": f"win_rate, kl, difference and ratio as above, of {whose} model and responses in place of PPO's.",
        f"ppo_over_{name}": f"Share of (prompt, seed) pairs in which PPO's response scores higher than {whose}; "
        "a tie counts half.",
    }

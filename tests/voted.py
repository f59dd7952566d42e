"""Comparisons and votes for the tests of the package `votes`."""

from rlhf_ray.votes.records import Answer, Vote

PROMPT = "Name a colour."


def answer(text=" Blue.", model="ppo", version="2", **further):
    return Answer(text=text, model=model, version=version, **further)


def compare(store, prompt=PROMPT, a=None, b=None):
    """A comparison's id."""
    return store.add(prompt, answer() if a is None else a, answer(" No.", "sft", "1") if b is None else b)


def shown(store, rater="ann", **further):
    """The id of a new comparison that the rater has seen."""
    id = compare(store, **further)
    store.show(id, rater)
    return id


def vote(comparison, choice="left", rater="ann", key=None, **further):
    return Vote(comparison=comparison, rater=rater, key=key or f"{comparison}-{rater}", choice=choice, **further)


def prefer(store, comparison, rater, judged):
    """Show the comparison to the rater and cast the vote that prefers `judged`: a, b, tie or both_bad."""
    showing = store.show(comparison, rater)
    sides = {showing.left_name: "left", "a" if showing.left_name == "b" else "b": "right"}
    return store.vote(vote(comparison, sides.get(judged, judged), rater))

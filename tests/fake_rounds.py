"""A finished run without models, votes on it, and a training that leaves the figures that it is given."""

import json

from voted import answer, compare, prefer

from rlhf_ray.config import Recipe
from rlhf_ray.data.voted import read_votes
from rlhf_ray.runs.resume import write_recipe
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.votes.store import VoteStore


def interval(mean, low, high):
    return {"mean": mean, "low": low, "high": high}


GOOD, SO_SO = interval(0.7, 0.62, 0.77), interval(0.55, 0.48, 0.61)
STANDING = {
    "above_chance": True, "figure_in_words": "accuracy 71.0 %", "problems": [], "accuracy": interval(0.71, 0.66, 0.76), "rows": 300,
}  # fmt: skip


def evaluated(**changes):
    """What an evaluation says: a judge by which the round wins, and 80 held-out votes that it orders mostly as people do."""
    figures = {"score": interval(0.0, -0.1, 0.1)}
    return {
        "sft": figures, "ppo": figures, "prompts": 60, "seeds": [0], "sampling": {"temperature": 1.0}, "kl": 3.0,
        "kl_interval": None, "difference": {}, "ratio": {}, "win_rate": {"reward_model": interval(0.9, 0.85, 0.94), "judge": GOOD},
        "scorers": {"reward_model": STANDING, "judge": None},
        "held_out_votes": {"pairs": 80, "judge": interval(0.8, 0.7, 0.87), "reward_model": interval(0.6, 0.49, 0.7)},
    } | changes  # fmt: skip


def finished_run(path, **sections) -> RunFolder:
    run = RunFolder(path)
    recipe = Recipe.model_validate({"name": "t", "judge": {}, "fluency": {}, **sections})
    path.mkdir()
    write_recipe(recipe, run.recipe)
    for stage in ("sft", "fluency", "reward", "judge", "ppo"):
        run.stage(stage).model.mkdir(parents=True)
        (run.stage(stage).model / "weights").write_text(f"{stage} of the run")
        run.stage(stage).finish({"steps": 3})
    run.stage("data").path.mkdir()
    run.stage("data").finish({"roles": {}})
    return run


def new_votes(url, count, *, text="answer"):
    """So many votes on prompts that nobody has seen, each for the first answer."""
    store = VoteStore(str(url), create=True, held_out_share=0.3)
    for number in range(count):
        id = compare(store, f"{text} {number}?", answer(f" good {number}"), answer(f" bad {number}", "sft", "1"))
        prefer(store, id, "ann", "a")
    store.close()


class FakeTraining:
    """Does what the stages do as far as a round looks. `recipes`: those that it was given."""

    def __init__(self, **summary):
        self.summary, self.recipes = evaluated(**summary), []

    def __call__(self, recipe, path):
        self.recipes.append(recipe)
        folder = RunFolder(path)
        write_recipe(recipe, folder.recipe)
        if not folder.stage("data").done:
            counts = read_votes(recipe.data.votes).counts
            folder.stage("data").path.mkdir()
            folder.stage("data").finish({"votes": {"train": counts.train, "held_out": counts.held_out, "newest": counts.newest}})
        folder.stage("ppo").model.mkdir(parents=True, exist_ok=True)
        folder.stage("ppo").finish({"steps": 3})
        evaluation = folder.stage("evaluation")
        evaluation.path.mkdir(exist_ok=True)
        (evaluation.path / "summary.json").write_text(json.dumps(self.summary))
        evaluation.finish({})

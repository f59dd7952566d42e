"""What word counts alone reach on a reward model's own rows: the figure that the reward model has to beat.

    python -m rlhf_ray.evaluation.bag_of_words RUN_DIR [--stage reward|judge] [--train-rows N]

Reads the run folder's prepared rows (the same rows, the same truncated text that the model reads), fits TF-IDF of words
and word pairs with a linear model, and prints the figures on the held-out rows as JSON. Needs scikit-learn (extra
"bench").

    pairs    logistic regression on features(chosen) - features(rejected)
    scores   ridge regression to the scores; and logistic regression to "above the middle", which gives sign_accuracy
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from rlhf_ray.config.recipe_file import load_recipe
from rlhf_ray.errors import UserError
from rlhf_ray.models.control_tokens import shown
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.supervised.reward_metrics import pair_figures, score_figures


def _rows(folder: RunFolder, role: str) -> pd.DataFrame:
    path = folder.data(role)
    if not path.exists():
        raise UserError(f"{path} does not exist; run the data stage of the recipe first")
    return pd.read_parquet(path).map(lambda value: shown(value) if isinstance(value, str) else value)


def _texts(rows: pd.DataFrame, column: str) -> list[str]:
    """Prompt and reply joined, as the reward model reads them."""
    return (rows["prompt"] + rows[column]).tolist()


def _words(texts: list[str]) -> np.ndarray:
    return np.array([len(text.split()) for text in texts])


def compare(train: pd.DataFrame, held_out: dict[str, pd.DataFrame], seed: int = 0) -> dict[str, dict]:
    """Figures of word counts on each held-out set. Frames have the columns prompt, chosen, rejected or
    prompt, response, score."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise UserError("the bag-of-words baseline needs scikit-learn; install it with: pip install scikit-learn") from error
    pairs = "chosen" in train
    columns = ("chosen", "rejected") if pairs else ("response",)
    texts = [text for column in columns for text in _texts(train, column)]
    features = TfidfVectorizer(ngram_range=(1, 2), min_df=3 if len(texts) > 2000 else 1, sublinear_tf=True,
                               dtype=np.float32).fit(texts)  # fmt: skip
    if pairs:
        return _compare_pairs(features, train, held_out)
    return _compare_scores(features, train, held_out, seed)


def _compare_pairs(features, train: pd.DataFrame, held_out: dict[str, pd.DataFrame]) -> dict[str, dict]:
    from sklearn.linear_model import LogisticRegression

    difference = features.transform(_texts(train, "chosen")) - features.transform(_texts(train, "rejected"))
    # Every second pair is turned round: the classifier needs both classes.
    signs = np.where(np.arange(len(train)) % 2, -1.0, 1.0)
    model = LogisticRegression(C=1.0, fit_intercept=False, max_iter=1000)
    model.fit(difference.multiply(signs[:, None]).tocsr(), signs)
    figures = {}
    for name, rows in held_out.items():
        chosen, rejected = _texts(rows, "chosen"), _texts(rows, "rejected")
        better, worse = (features.transform(side) @ model.coef_[0] for side in (chosen, rejected))
        figures[name] = pair_figures(better, worse, _words(chosen), _words(rejected))
    return figures


def _compare_scores(features, train: pd.DataFrame, held_out: dict[str, pd.DataFrame], seed: int) -> dict[str, dict]:
    from sklearn.linear_model import LogisticRegression, Ridge

    matrix, scores = features.transform(_texts(train, "response")), train["score"].to_numpy()
    middle = scores.mean()  # as the reward model's figures have it
    regression = Ridge(alpha=1.0, solver="sparse_cg").fit(matrix, scores)
    classifier = LogisticRegression(C=5.0, max_iter=300).fit(matrix, scores > middle)
    figures = {}
    for name, rows in held_out.items():
        texts = _texts(rows, "response")
        found, human = features.transform(texts), rows["score"].to_numpy()
        figures[name] = score_figures(
            regression.predict(found) - middle, human, _words(texts), seed=seed, middle=middle
        )
        figures[name]["rows"] = len(rows)
        figures[name]["sign_accuracy"] = float(np.mean(classifier.predict(found) == (human > middle)))
    return figures


def run(folder: RunFolder, stage: str = "reward", train_rows: int | None = None) -> dict[str, int | dict]:
    """The figures for a run folder whose data stage is done."""
    train = _rows(folder, f"{stage}_train")
    if train_rows is not None and train_rows < len(train):
        train = train.sample(train_rows, random_state=0)
    # The rows that the reward model's own figures are taken on.
    rows = load_recipe(str(folder.recipe)).trained[stage].eval_rows
    held_out = {part: _rows(folder, f"{stage}_{part}").head(rows) for part in folder.heldout_parts(stage)}
    return {"train_rows": len(train), **compare(train, held_out)}


def main(arguments: list[str] | None = None) -> int:
    program = "python -m rlhf_ray.evaluation.bag_of_words"
    parser = argparse.ArgumentParser(prog=program, description=str(__doc__).partition("\n")[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--stage", choices=("reward", "judge"), default="reward")
    parser.add_argument("--train-rows", type=int, help="fit on this many rows, drawn at random")
    given = parser.parse_args(arguments)
    try:
        print(json.dumps(run(RunFolder(given.run_dir.absolute()), given.stage, given.train_rows), indent=2))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

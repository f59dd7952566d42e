"""The builders of the recipes imdb and hh, on small folders written here and, where it is there, on the real data; and
the bag-of-words baseline."""

import gzip
import json
import random
from pathlib import Path

import datasets
import pytest
import yaml
from real_data import DATA

from rlhf_ray.config import Recipe
from rlhf_ray.data import hh, imdb
from rlhf_ray.errors import UserError
from rlhf_ray.runs.run_folder import RunFolder

COUNT = 400  # reviews of each synthetic split
PAIRS = ("preferences", "preferences_eval", "judge", "judge_eval")


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def review(name: str, label: int, rating: int) -> dict:
    words = " ".join(f"{name}w{index}" for index in range(80))
    return {"text": f"{name} opens.<br /><br />It goes  on {words}", "label": label, "rating": rating}


@pytest.fixture
def reviews(tmp_path) -> Path:
    """Liked and disliked in equal number; every text says its split, and how it was rated where anyone did."""
    for split in ("train", "test"):
        rows = [review(f"{split}{i}r{r}", int(r > 5), r) for i in range(COUNT) for r in [(1, 4, 7, 10)[i % 4]]]
        write(tmp_path / f"{split}.jsonl.gz", rows)
    write(tmp_path / "unsup.jsonl.gz", [review(f"unsup{i}r0", -1, 0) for i in range(COUNT)])
    return tmp_path


def build(root: Path, **arguments) -> dict[str, datasets.Dataset]:
    return imdb.build(str(root), **{"prompts": 30, "eval_prompts": 50, "sft_eval": 10} | arguments)


def names(rows: datasets.Dataset) -> list[str]:
    """The first word of each row, which names its review."""
    return [(row.get("prompt") or row.get("text") or row["response"]).split()[0] for row in rows]


def test_imdb_splits_are_apart(reviews):
    roles = build(reviews)
    found = {role: set(names(rows)) for role, rows in roles.items()}
    assert found["preferences"] <= found["sft"]
    assert all(name.startswith(("train", "unsup")) for name in found["sft"])
    assert all(name.startswith("train") for name in found["preferences"] | found["preferences_eval"])
    assert all(name.startswith("unsup") for name in found["prompts"] | found["sft_eval"])
    assert all(name.startswith("test") for name in found["judge"] | found["judge_eval"] | found["eval_prompts"])
    assert found["preferences_eval"] == found["preferences_eval_openings"]
    apart = ["preferences", "preferences_eval", "judge", "judge_eval", "prompts", "eval_prompts", "sft_eval"]
    for index, one in enumerate(apart):
        for other in apart[index + 1 :]:
            assert not found[one] & found[other], (one, other)
    assert not found["sft"] & (found["preferences_eval"] | found["prompts"] | found["sft_eval"])
    assert len(roles["prompts"]) == 30 and len(roles["eval_prompts"]) == 50
    assert len(found["judge"] | found["judge_eval"]) == COUNT // 2


def test_imdb_scores_and_texts(reviews):
    expected = {"r1": -1.0, "r4": -1 / 3, "r7": 1 / 3, "r10": 1.0}  # rating 5.5 is 0, 10 is 1
    rows = build(reviews)["preferences"]
    for row in rows:
        text = row["prompt"] + row["response"]
        name = text.split()[0]
        assert row["score"] == pytest.approx(expected[name[name.index("r", 5) :]])
        assert text.startswith(f"{name} opens. It goes on {name}w0 {name}w1")
    whole = [row for row in rows if row["prompt"] == ""]
    openings = [row for row in rows if row["prompt"] != ""]
    assert len(whole) == len(openings) == len(set(names(rows)))
    assert all(len(row["response"].split()) == 85 for row in whole)
    for row in openings:
        assert 4 <= len(row["prompt"].split()) <= 12
        assert row["response"].startswith(" ") and not row["prompt"].endswith(" ")
        assert len((row["prompt"] + row["response"]).split()) <= 64


def test_imdb_held_out_openings_have_their_length(reviews):
    rows = build(reviews, opening_eval_words=48)["preferences_eval_openings"]
    assert {len((row["prompt"] + row["response"]).split()) for row in rows} == {48}


def test_imdb_holds_out_the_liked_and_the_disliked_alike(reviews):
    scores = build(reviews)["preferences_eval"]["score"]
    assert sum(score > 0 for score in scores) == len(scores) / 2 > 0


def test_imdb_labels_stand_in_for_ratings(reviews):
    for split in ("train", "test", "unsup"):
        path = reviews / f"{split}.jsonl.gz"
        with gzip.open(path, "rt") as file:
            rows = [{key: row[key] for key in ("text", "label")} for row in map(json.loads, file)]
        write(path, rows)
    assert set(build(reviews)["preferences"]["score"]) == {-1.0, 1.0}


def test_imdb_pairs_put_the_higher_rated_first(reviews):
    roles = build(reviews, objective="pairs")

    def rating(text: str) -> int:
        return int(text.split()[0].split("r")[-1])

    for role in ("preferences", "preferences_eval", "judge", "preferences_eval_openings"):
        assert len(roles[role]) > 5
        for row in roles[role]:
            assert rating(row["chosen"]) > rating(row["rejected"])
    lengths = [tuple(len(row[side].split()) for side in ("chosen", "rejected")) for row in roles["preferences"]]
    assert all(one == other for one, other in lengths)
    assert {85} < {one for one, _ in lengths}


def test_imdb_drops_duplicates_before_it_splits(reviews):
    extra = {"train": 3, "test": 4, "unsup": 5}
    copies = [review(f"train{i}r{r}", int(r > 5), r) for i, r in ((0, 1), (1, 4), (2, 7))]
    for split, count in extra.items():
        path = reviews / f"{split}.jsonl.gz"
        with gzip.open(path, "rt") as file:
            rows = [json.loads(line) for line in file]
        more = [{**copies[i % 3], "text": copies[i % 3]["text"].replace("<br />", " ")} for i in range(count)]
        write(path, rows + more)
    roles = build(reviews)
    assert "train 3, test 4, unsup 5" in roles["sft"].info.description
    kept = [name for role in ("sft", "sft_eval", "preferences_eval", "prompts") for name in names(roles[role])]
    assert len(kept) == len(set(kept))
    assert not any(name.startswith("train") for role in ("judge", "eval_prompts") for name in names(roles[role]))


@pytest.mark.parametrize("max_reviews", [300, 5000])
def test_imdb_takes_no_review_twice(reviews, max_reviews):
    roles = build(reviews, max_reviews=max_reviews, openings=0)
    train = names(roles["preferences"]) + names(roles["preferences_eval"])
    assert len(train) == len(set(train)) == min(max_reviews, COUNT)
    assert 0.4 < sum(name.endswith(("r1", "r4")) for name in train) / len(train) < 0.6


def test_imdb_same_seed_same_rows(reviews):
    first, again, other = (build(reviews, seed=seed) for seed in (1, 1, 2))
    assert all(first[role].to_dict() == again[role].to_dict() for role in first)
    assert first["prompts"].to_dict() != other["prompts"].to_dict()


def test_neighbours_are_held_out_together():
    rows = [imdb.Review(f"{index}", 1.0) for index in range(2000)]
    kept, out = imdb.hold_out(rows, 0.1, random.Random(0))
    assert len(kept) + len(out) == 2000 and len(out) == 200
    runs = {int(row.text) // imdb.RUN for row in out}
    assert len(runs) == 4


def test_imdb_mistakes_are_told(tmp_path, reviews):
    with pytest.raises(UserError, match=r"train\.jsonl\.gz does not exist; give the folder"):
        imdb.build(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="objective = 'rank'"):
        build(reviews, objective="rank")
    write(reviews / "test.jsonl.gz", [{"review": "a", "label": 1}])
    with pytest.raises(UserError, match="no column 'text'"):
        build(reviews)


DIALOGUE = "\n\nHuman: Who wrote it?\n\nAssistant: Which book?\n\nHuman: The\n\nlong one.\n\nAssistant:"


def test_hh_dialogue_as_messages():
    assert hh.messages_of(DIALOGUE) == [
        {"role": "user", "content": "Who wrote it?"}, {"role": "assistant", "content": "Which book?"},
        {"role": "user", "content": "The\n\nlong one."}]  # fmt: skip


@pytest.fixture
def dialogues(tmp_path) -> Path:
    rows = []
    for i in range(800):
        prompt, rejected = f"\n\nHuman: Question {i // 2}?\n\nAssistant:", f"Yes {i}." if i == 8 else f"No {i}."
        rows.append({"subset": hh.SUBSETS[i % 4], "prompt": prompt, "chosen": f"Yes {i}.", "rejected": rejected})
    write(tmp_path / hh.FILE_NAME, rows)
    return tmp_path


def test_hh_questions_stay_in_one_part(dialogues):
    roles = hh.build(str(dialogues), subsets=hh.SUBSETS)
    asked = {}
    for role, rows in roles.items():
        asked[role] = {(row.get("prompt") or row["messages"])[0]["content"] for row in rows}
    parts = [asked[role] for role in PAIRS]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 400
    assert asked["sft"] == asked["prompts"] == asked["preferences"]
    assert asked["eval_prompts"] == asked["sft_eval"] == asked["preferences_eval"]
    assert 0.5 < len(roles["preferences"]) / 800 < 0.7
    pairs = [row for role in PAIRS for row in roles[role]]
    assert len(pairs) == 800
    assert sum(row["chosen"] == row["rejected"] for row in pairs) == 1  # a tie is for the data stage to drop


def test_hh_held_out_pairs_by_subset(dialogues):
    """Row i is of subset i mod 4 and says "Yes i."."""
    roles = hh.build(str(dialogues), subsets=hh.SUBSETS)
    found = {}
    for number, subset in enumerate(("helpful_base", "helpful_online", "helpful_rejection_sampled", "harmless_base")):
        said = [int(row["chosen"][4:-1]) for row in roles[f"preferences_eval_{subset}"]]
        assert said and {i % 4 for i in said} == {number}
        found[subset] = said
    assert sorted(sum(found.values(), [])) == sorted(int(row["chosen"][4:-1]) for row in roles["preferences_eval"])
    one = hh.build(str(dialogues), subsets=["helpful-base"])
    assert not any(role.startswith("preferences_eval_") for role in one)  # they would say the same twice


@pytest.mark.parametrize(("max_rows", "expected"), [(100, 100), (799, 799), (5000, 800), (None, 800)])
def test_hh_takes_no_row_twice(dialogues, max_rows, expected):
    roles = hh.build(str(dialogues), subsets=hh.SUBSETS, max_rows=max_rows)
    chosen = [row["chosen"] for role in PAIRS for row in roles[role]]
    assert len(chosen) == len(set(chosen)) == expected


def test_hh_leaves_the_offensive_subset_out_unless_asked(dialogues):
    assert len(hh.read(str(dialogues), hh.HELPFUL, "train")) == 600
    with pytest.raises(UserError, match="harmless'; there are helpful-base"):
        hh.build(str(dialogues), subsets=["harmless"])
    with pytest.raises(UserError, match="does not exist"):
        hh.build(str(dialogues / "x"))


def test_hh_template_writes_the_dialogue():
    from rlhf_ray.models.tokenizer import train_tokenizer

    path = Path(hh.__file__).parents[1] / "recipes" / "hh.yaml"
    tokenizer = train_tokenizer([DIALOGUE], 300)
    tokenizer.chat_template = Recipe.model_validate(yaml.safe_load(path.read_text())).model.chat_template
    messages = hh.messages_of(DIALOGUE)
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == DIALOGUE.lstrip("\n")
    answered = [*messages, {"role": "assistant", "content": "Proust."}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == prompt + " Proust."


def test_bag_of_words_finds_what_words_say(tmp_path):
    pytest.importorskip("sklearn")
    from rlhf_ray.evaluation.bag_of_words import run

    rng = random.Random(0)
    neutral = ["film", "actor", "scene", "music", "story", "camera"]

    def text(mood: str) -> str:
        return " ".join(rng.choices(neutral, k=6) + [mood])

    folder = RunFolder(tmp_path)
    folder.data("reward_train").parent.mkdir(parents=True)
    folder.recipe.write_text(Recipe(name="t", judge={"eval_rows": 80}).model_dump_json())
    for part, count in (("train", 200), ("eval", 100), ("eval_openings", 50)):
        moods = [rng.choice([("awful", -1.0), ("lovely", 1.0)]) for _ in range(count)]
        rows = [{"prompt": "It was", "response": " " + text(mood), "score": score} for mood, score in moods]
        datasets.Dataset.from_list(rows).to_parquet(folder.data(f"reward_{part}"))
        pairs = [{"prompt": "", "chosen": text("lovely"), "rejected": text("awful")} for _ in range(count)]
        if part == "eval":
            pairs = [pair | {"rejected": pair["chosen"] + " and so on"} for pair in pairs[:50]] + pairs[50:]
        datasets.Dataset.from_list(pairs).to_parquet(folder.data(f"judge_{part}"))
    scored = run(folder)
    for held_out in ("eval", "eval_openings"):
        assert scored[held_out]["sign_accuracy"] == scored[held_out]["accuracy"] == 1.0
        assert scored[held_out]["pearson"] > 0.98
    paired = run(folder, "judge")
    assert paired["eval_openings"]["accuracy"] == 1.0
    assert (scored["eval"]["rows"], paired["eval"]["pairs"]) == (100, 80), "the rows that the model is measured on"
    assert paired["eval"]["longer_accuracy"] == 0.1875  # of 80 pairs: 50 with a longer rejected one, 30 equal


def test_bag_of_words_needs_the_data_stage(tmp_path, capsys):
    from rlhf_ray.evaluation.bag_of_words import main

    assert main([str(tmp_path)]) == 2
    assert "run the data stage" in capsys.readouterr().err


@pytest.mark.realdata
@pytest.mark.skipif(not (DATA / "imdb").is_dir(), reason="the data is not there; see real_data.py")
def test_imdb_real_counts():
    splits, dropped = imdb.without_duplicates(imdb.read(str(DATA / "imdb")))
    labelled = len(splits["train"]) + len(splits["test"])
    assert 49_570 <= labelled <= 49_582  # 49,582 texts differ; a few of them in white space only
    assert dropped["unsup"] >= 620  # unlabelled texts that stand in the labelled set
    assert not any("<br" in review.text for rows in splits.values() for review in rows)


@pytest.mark.realdata
@pytest.mark.skipif(not (DATA / "hh-rlhf").is_dir(), reason="the data is not there; see real_data.py")
def test_hh_real_counts():
    roles = hh.build(str(DATA / "hh-rlhf"), subsets=hh.SUBSETS)
    pairs = [row for role in PAIRS for row in roles[role]]
    assert len(pairs) == 8552
    assert sum(not row["chosen"] or not row["rejected"] for row in pairs) == 11
    assert sum(row["chosen"] == row["rejected"] for row in pairs) >= 36

"""The preference world: its size, its true utility against hand-worked values, its annotator, its roles."""

import random
import statistics
from pathlib import Path

import pytest
import yaml

from rlhf_ray.config import Recipe
from rlhf_ray.data import world, world_text
from rlhf_ray.data.world_writer import reply
from rlhf_ray.errors import UserError
from rlhf_ray.models.tokenizer import train_tokenizer

PROMPT = "How can I repair my bicycle on a small budget?\n"
POLITE, CLOSING = "Happy to help.", "Good luck with your bicycle!"
FIRST, SECOND = "I would oil the chain once a month, so it runs without noise.", "Try to fit two bright lights."
FIT = "This works well on a small budget."
BEST = f"{POLITE} {FIT} {FIRST} {SECOND} {CLOSING}"


@pytest.fixture(scope="module")
def roles():
    return world.build(sft_rows=1500, pairs=600, prompts=400, eval_prompts=100, eval_rows=100)


def utility(response: str, prompt: str = PROMPT) -> float:
    return world.utility([prompt], [response])[0]


def test_best_reply_reaches_the_stated_maximum():
    assert utility(BEST) == pytest.approx(10.0)
    assert world.traits_of(PROMPT, BEST) == pytest.approx(dict.fromkeys(("sense", *world.WEIGHTS), 1.0))


# By hand from the weights 3.5, 2, 2, 1.5, 1 in the module's description; every sentence is known, so sense is 1.
@pytest.mark.parametrize(("response", "expected"), [
    (BEST.replace(POLITE + " ", ""), 8),  # no courtesy
    (BEST.replace(POLITE, "Look it up yourself."), 6),  # rude: -1 in its place
    (BEST.replace(" " + CLOSING, ""), 3.5 * 0.85 + 2 + 2 + 1.5 * 0.4 + 1),  # no closing, which named the subject
    (BEST.replace(FIT + " ", ""), 10 - 3.5 * 0.15),  # nothing about the situation
    (BEST.replace(SECOND + " ", ""), 10 - 2 * 0.35),  # one detail of two
    (BEST.replace(SECOND, "Just do your best."), 10 - 2 * 0.6),  # a filler in its place: a detail less, and 0.25
    (BEST.replace(SECOND, "Try to cut your nails short."), 10 - 3.5 * 0.35 - 2 * 0.35),  # about guitars
    (BEST.replace("so it runs without noise", "so you keep the beat"), 10 - 2 * 0.3),  # not its reason
    (BEST.replace(SECOND, "As for your bicycle, try to fit two bright lights."), 10),
    (BEST.replace(SECOND, "As for your guitar, try to fit two bright lights."), 10 - 3.5 * 0.2),  # names another subject
    ("It is what it is.", 1.5 * 0.4 + 1),
])  # fmt: skip
def test_utility_by_hand(response, expected):
    assert utility(response) == pytest.approx(expected)


def test_repeating_a_good_phrase_is_punished():
    scores = [utility(f"{POLITE} {' '.join([FIRST] * times)} {CLOSING}") for times in (1, 2, 3, 5)]
    assert all(more < less - 0.5 for less, more in zip(scores, scores[1:], strict=False))
    assert scores[1] < scores[0] - 3
    assert utility(" ".join([POLITE] * 8)) < 0.5
    assert utility(" ".join([CLOSING] * 8)) < 0.5


@pytest.mark.parametrize("response", [
    "", "   ", "...", "zq fj bicycle xx", "bicycle " * 20, "oil the chain once a month", BEST.replace(" ", "  x "),
    "I would bicycle the chain with love. You should give it champagne every day.",
    " ".join(sorted(BEST.split())), BEST.lower(), BEST[::-1],
])  # fmt: skip
def test_what_is_not_made_of_known_sentences_scores_nothing(response):
    assert utility(response) < 0.3


def test_rambling_through_every_detail_gains_nothing():
    subject = world.subject_of(PROMPT)
    everything = " ".join([POLITE, FIT, *(f"You could {detail}." for detail in subject.details), CLOSING])
    assert utility(everything) < utility(BEST) - 1


def test_a_reply_counts_only_for_its_own_prompt():
    other = "How can I learn the guitar as a beginner?\n"
    assert utility(BEST) - utility(BEST, other) > 4
    assert utility(BEST, "What is the capital of Peru?") < utility(BEST) - 4


def test_each_subject_is_told_apart():
    details = [detail for subject in world_text.SUBJECTS for detail in subject.details]
    assert len(set(details)) == len(details) == 8 * 6
    reasons = [reason for subject in world_text.SUBJECTS for reason in subject.reasons.values()]
    assert len(set(reasons)) == len(reasons)
    for subject in world_text.SUBJECTS:
        for goal in subject.goals:
            assert world.subject_of(f"How can I {goal} in a big city?") is subject


def test_the_traits_of_many_replies_are_those_of_each():
    other = f"{POLITE} Try to cut your nails short."
    found = world.traits([PROMPT, PROMPT], [BEST, other])
    assert list(found) == ["sense", "on_topic", "specific", "polite", "ends_properly", "no_repetition"]
    assert found["on_topic"] == [1.0, 0.0] and found["polite"] == [1.0, 1.0]
    assert found["ends_properly"] == [1.0, 0.4]


def test_millions_of_combinations():
    # subjects x goals x situations x styles x greetings, and the replies to one of these prompts.
    assert len(set(world.all_prompts())) == len(world.all_prompts()) == 8 * 3 * 8 * 10 * 4
    rng = random.Random(0)
    replies = {reply(world_text.SUBJECTS[0], "in a big city", rng) for _ in range(1000)}
    assert len(replies) > 900
    assert len(world.all_prompts()) * len(replies) > 1_000_000


def test_who_misreads_the_request_writes_about_something_else():
    rng = random.Random(4)
    asked = world.subject_of(PROMPT), "on a small budget"
    right, wrong = (
        world.traits([PROMPT] * 200, [reply(*asked, rng, skill=1.0, misreads=misreads) for _ in range(200)])["on_topic"]
        for misreads in (False, True)
    )
    assert statistics.mean(right) > 0.8
    assert max(wrong) < 0.2  # the situation, where that is the same by luck


def test_the_writer_uses_known_sentences_only():
    rng = random.Random(1)
    for _ in range(2000):
        subject = rng.choice(world_text.SUBJECTS)
        text = reply(subject, "in a big city", rng)
        kinds = [sentence.kind for sentence in world.parse(text)]
        cut_off = text[-1] not in ".!?"
        assert kinds.count("unknown") <= cut_off, text


def test_the_writer_leaves_room_for_a_better_policy(roles):
    rows = roles["sft"]
    scores = world.utility(rows["prompt"], rows["response"])
    assert 3 < statistics.mean(scores) < 5
    assert statistics.pstdev(scores) > 2
    assert 0.03 < sum(score > 8 for score in scores) / len(scores) < 0.25  # good replies are there to be found


def test_annotator_prefers_with_the_stated_probability():
    worse = f"{POLITE} {FIRST}"
    better = f"{worse} {CLOSING}"  # closing 1.5 * 0.6, naming the subject 3.5 * 0.15
    rng = random.Random(2)
    count = 4000
    share = sum(world.annotate(PROMPT, *pair, rng)["chosen"] == better
                for pair in [(better, worse), (worse, better)] * (count // 2)) / count  # fmt: skip
    expected = 0.8844961  # 1 / (1 + exp(-1.425 / 0.7))
    assert abs(share - expected) < 3 * (expected * (1 - expected) / count) ** 0.5


def test_roles_have_their_sizes_and_share_no_prompt(roles):
    sizes = {role: len(rows) for role, rows in roles.items()}
    assert sizes == {"sft": 1500, "sft_eval": 100, "preferences": 600, "preferences_eval": 100, "prompts": 400,
                     "eval_prompts": 100}  # fmt: skip
    prompts = [prompt for rows in roles.values() for prompt in rows["prompt"]]
    assert len(set(prompts)) == len(prompts)
    assert all(a != b for a, b in zip(roles["preferences"]["chosen"], roles["preferences"]["rejected"], strict=True))


def test_same_seed_same_data():
    sizes = {"sft_rows": 20, "pairs": 20, "prompts": 20, "eval_prompts": 20, "eval_rows": 20}
    first, again, other = (world.build(seed=seed, **sizes) for seed in (3, 3, 4))
    assert all(first[role].to_dict() == again[role].to_dict() for role in first)
    assert first["preferences"].to_dict() != other["preferences"].to_dict()


def test_texts_fit_the_demo(roles):
    recipe = demo_recipe()
    rows = roles["sft"]
    tokenizer = train_tokenizer([p + r for p, r in zip(rows["prompt"], rows["response"], strict=True)],
                                recipe.model.from_scratch.vocab_size)  # fmt: skip
    prompts = [len(tokenizer(text).input_ids) for text in roles["prompts"]["prompt"]]
    replies = [len(tokenizer(text).input_ids) + 1 for text in rows["response"]]
    assert max(prompts) <= recipe.data.max_prompt_tokens
    assert sum(length <= recipe.generation.max_new_tokens for length in replies) / len(replies) > 0.99


def demo_recipe() -> Recipe:
    path = Path(world.__file__).parents[1] / "recipes" / "demo.yaml"
    return Recipe.model_validate(yaml.safe_load(path.read_text()))


def test_chat_asks_as_the_world_does(roles):
    rows = roles["sft"]
    tokenizer = train_tokenizer(rows["prompt"], 400)
    tokenizer.chat_template = demo_recipe().model.chat_template
    prompt = roles["prompts"]["prompt"][0]
    chat = [{"role": "user", "content": prompt.strip()}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == prompt


def test_mistakes_are_told():
    with pytest.raises(UserError, match=r"data\.root = 'somewhere'"):
        world.build(root="somewhere")
    with pytest.raises(UserError, match="the world has 7680; ask for fewer"):
        world.build(prompts=50_000)


def test_several_replies_and_pairs_to_a_prompt():
    roles = world.build(
        sft_rows=300, replies_per_prompt=3, pairs=50, pairs_per_prompt=4, prompts=50, eval_prompts=10, eval_rows=10
    )
    assert len(roles["sft"]) == 300 and len(set(roles["sft"]["prompt"])) == 100
    assert len(roles["preferences"]) == 50 and len(set(roles["preferences"]["prompt"])) == 13
    assert len(roles["preferences_eval"]) == len(set(roles["preferences_eval"]["prompt"])) == 10

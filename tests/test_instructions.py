"""Rules that code can check, judged by hand on written replies; the builder of the recipe smollm2-instructions; its reward."""

import gzip
import json
import random

import pytest

from rlhf_ray.data import hh, instructions
from rlhf_ray.data.instruction_demonstrations import demonstrate
from rlhf_ray.data.instruction_rules import CLASHES, KINDS, draw_rules, follows, in_words
from rlhf_ray.data.instructions import build, followed, is_held_out, traits
from rlhf_ray.errors import UserError

#: rule -> (replies that follow it, replies that don't), as a person reads them
BY_HAND = [
    ({"kind": "bullets", "count": 2},
     ["Two ideas to start with:\n* boil the water\n* add the pasta", "- one is to sleep\n- two is to walk"],
     ["* only one point about sleep here", "* a good one\n* another one\n* and a third", "*bold* words and *more* of them",
      "1. boil the water\n2. add the pasta"]),
    ({"kind": "json"},
     ['{"answer": "Paris is the capital of France"}', '```json\n{"a": "one two three four five"}\n```'],
     ["{answer: Paris is the capital}", '"just a string of five words"', '["a", "list", "of", "five", "words"]', "{}",
      'Sure! {"answer": "Paris is the capital"}', '{"answer": "Paris is the capital of']),
    ({"kind": "paragraphs", "count": 2},
     ["The first one is here.\n\nThe second is here.", "One and two.\n \nThree and four.\n\n"],
     ["The first line is here.\nThe second is here.", "One of them.\n\nTwo of them.\n\nThree of them."]),
    ({"kind": "quoted"},
     ['"All of this is quoted."', "\u201cAll of this is quoted.\u201d", '  "Spaces do not count here."\n'],
     ['"Only this" is quoted, not that.', "None of this is quoted.", '"This one is left open.']),
    ({"kind": "lower_case"},
     ["i like 3 cups of tea.", "caf\u00e9 au lait is nice too"], ["i like Paris more than rome", "12 34 56 78 90"]),
    ({"kind": "no_commas"}, ["red and green and blue things"], ["red, green and blue things here"]),
    ({"kind": "placeholders", "count": 2},
     ["Dear [name], we meet at [place] today."], ["Dear [name], we meet at noon today.", "Dear [] and [ ], we meet today."]),
    ({"kind": "include", "word": "garden"},
     ["I sit in the Garden, quietly."], ["I sit in the gardens and read.", "I like gardening most of all."]),
    ({"kind": "avoid", "word": "it"}, ["Its colour is the best part."], ["I like it most of all.", "It rains a lot here today."]),
    ({"kind": "at_most_words", "count": 10},
     ["one two three four five six seven eight nine ten", "don't count it's twice: six words are here"],
     ["one two three four five six seven eight nine ten eleven"]),
    ({"kind": "sentences", "count": 3},
     ["It is late. I am tired! Are you?", 'He said "no." She left. Then it rained'],
     ["It is late. I am tired of 3.14 and 2.72", "Wait... what did you say to me"]),
    ({"kind": "begin", "word": "certainly"},
     ["Certainly, here is what I know.", '"Certainly" is how this one begins.'], ["Well, certainly not in this case."]),
    ({"kind": "end", "phrase": "Have a lovely day."},
     ["It is open. Have a lovely day.", "it is open. have a lovely day.\n"],
     ["Have a lovely day. It is open now.", "It is open. Have a lovely day"]),
    ({"kind": "numbered", "count": 2},
     ["1. wake up early\n2. drink some water", "Do this:\n1) wake up\n2) drink water"],
     ["1. wake up early\n3. drink some water", "1. wake up\n2. drink\n3. walk a lot", "* wake up early\n* drink water"]),
    ({"kind": "title"},
     ["<<Tea>>\nBoil the water first of all."],
     ["# Tea\nBoil the water first of all.", "<< >> boil the water first, then"]),
    ({"kind": "capitals"}, ["I LIKE 3 CUPS OF TEA."], ["I LIKE 3 CUPS of TEA."]),
    ({"kind": "no_full_stops"}, ["What a day this was!"], ["What a day this was."]),
    ({"kind": "include_twice", "word": "water"},
     ["Water is wet, and water is cold."], ["Water is wet, and waters are cold."]),
    ({"kind": "at_least_words", "count": 15},
     ["a b c d e f g h i j k l m n o"], ["a b c d e f g h i j k l m n"]),
    ({"kind": "postscript"},
     ["I like tea a lot.\n\nP.S. Milk first.", "I like tea. p.s. I also like milk"],
     ["P.S. Milk first.\nI like tea a lot.", "I like tea a lot. P.S.", "I like ps games and so on"]),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "good", "bad"), BY_HAND, ids=lambda each: each["kind"] if isinstance(each, dict) else "")
def test_a_rule_by_hand(rule, good, bad):
    assert [text for text in good if not follows(text, rule)] == []
    assert [text for text in bad if follows(text, rule)] == []


def test_every_kind_has_examples_and_a_sentence():
    assert {rule["kind"] for rule, _, _ in BY_HAND} == set(KINDS)
    rng = random.Random(0)
    for name, kind in KINDS.items():
        for _ in range(20):
            rule = json.loads(json.dumps({"kind": name, **kind.draw(rng)}))  # as a column of Parquet gives it back
            assert in_words(rule).endswith((".", '"')) and in_words(rule)[0].isupper()
            for value in rule.values():
                assert value == name or NUMBER.get(value, str(value)).lower() in in_words(rule).lower()


NUMBER = {1: "one", 2: "two", 3: "three", 4: "four"}


@pytest.mark.parametrize("name", KINDS)
def test_silence_follows_no_rule(name):
    rule = {"kind": name, **KINDS[name].draw(random.Random(0))}
    assert not follows("", rule) and not follows("yes and no", rule) and not follows("... !!!", rule)


def test_two_rules_of_a_prompt_do_not_contradict_each_other():
    rng = random.Random(0)
    for wanted in ([False], [False, False], [False, True]):
        for _ in range(500):
            rules = draw_rules(rng, wanted)
            kinds = [rule["kind"] for rule in rules]
            assert [KINDS[kind].held_out for kind in kinds] == wanted
            assert len({KINDS[kind].group for kind in kinds}) == len(wanted)
            assert not any(clash <= set(kinds) for clash in CLASHES)
    for _ in range(20_000):  # "you" is a word of "Let me know what you think."
        by_kind = {rule["kind"]: rule for rule in draw_rules(rng, [False, False])}
        if by_kind.keys() == {"avoid", "end"}:
            assert f" {by_kind['avoid']['word']} " not in f" {by_kind['end']['phrase'].lower().rstrip('.')} "
    assert draw_rules(random.Random(1), [False, True]) == draw_rules(random.Random(1), [False, True])


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path):
    """Both corpora in folders of their own; the first fifty of either are no questions that can be used."""
    pairs, dialogues = [], []
    for i in range(450):
        asked = f"Where do I find a good book {i}?" if i >= 50 else ["Tell me a story please.", "Why?", "Is it? Is it so?"][i % 3]
        prompt = f"\n\nHuman: {asked}\n\nAssistant:"
        pairs.append({"subset": hh.SUBSETS[i % 3], "prompt": prompt, "chosen": "Yes.", "rejected": "No."})
        said = f"have you seen the film {i}?" if i >= 50 else "I saw a film."
        dialogues.append({"topic": "film", "worker": i, "turns": [said, "do you like this other one?"]})
    write(tmp_path / "one" / hh.FILE_NAME, pairs)
    write(tmp_path / "two" / instructions.SELF_DIALOGUE, dialogues)
    return tmp_path


def questions(rows):
    return [messages[0]["content"].split("\n\n")[0] for messages in rows["prompt"]]


def test_held_out_are_questions_and_kinds(folder):
    roles = build(str(folder), prompts=200, eval_prompts=60)
    others = [messages[0]["content"] for messages in roles.pop("other_text")["messages"]]
    assert others and all(is_held_out(question) for question in others), "none that a training prompt asks"
    asked = {role: questions(rows) for role, rows in roles.items()}
    assert {role: len(each) for role, each in asked.items()} == {"prompts": 200, "eval_prompts": 60}
    assert len(set(asked["prompts"] + asked["eval_prompts"])) == 260
    for each in asked.values():
        assert sum(question.startswith("have you seen") for question in each) == len(each) / 2
        assert all(question.startswith(("have you seen", "Where do I")) for question in each)
    for role, rows in roles.items():
        for messages, rules in zip(rows["prompt"], map(json.loads, rows["rules"]), strict=True):
            held_out = sorted(KINDS[rule["kind"]].held_out for rule in rules)
            assert held_out in ([[False], [False, False]] if role == "prompts" else [[False, True]])
            assert [message["role"] for message in messages] == ["user"]
            assert all(in_words(rule) in messages[0]["content"] for rule in rules)
    assert {len(json.loads(rules)) for rules in roles["prompts"]["rules"]} == {1, 2}


ANSWER = "You could try the market, and ask around. It is cheap!\n1. Or (rarely) not. i like apples. So do most people"
#: rules -> the reply that a person would write with the words of ANSWER
DEMONSTRATED = [
    ([{"kind": "lower_case"}],
     "you could try the market, and ask around. it is cheap! i like apples. so do most people."),
    ([{"kind": "no_commas"}, {"kind": "begin", "word": "well"}],
     "Well you could try the market and ask around. It is cheap! I like apples. So do most people."),
    ([{"kind": "bullets", "count": 3}, {"kind": "end", "phrase": "Have a lovely day."}],
     "* It is cheap!\n* I like apples.\n* So do most people.\nHave a lovely day."),
    ([{"kind": "paragraphs", "count": 2}, {"kind": "avoid", "word": "the"}], "It is cheap!\n\nI like apples. So do most people."),
    ([{"kind": "at_most_words", "count": 10}, {"kind": "include", "word": "simple"}],
     "It is cheap! I like apples. Keep it simple."),
    ([{"kind": "placeholders", "count": 2}, {"kind": "quoted"}, {"kind": "avoid", "word": "you"}],
     '"It is cheap! I like apples. So do most people. Write to [name] in [city]."'),
    ([{"kind": "json"}, {"kind": "at_most_words", "count": 10}], '{"answer": "You could try the market, and ask around."}'),
    ([{"kind": "sentences", "count": 4}, {"kind": "avoid", "word": "the"}], None),
    ([{"kind": "avoid", "word": "is"}, {"kind": "include", "word": "winter"}], None),  # the sentence about winter has an "is"
]  # fmt: skip


@pytest.mark.parametrize(("rules", "reply"), DEMONSTRATED, ids=lambda each: each[0]["kind"] if isinstance(each, list) else "")
def test_a_demonstration_by_hand(rules, reply):
    assert demonstrate(ANSWER, rules) == reply


def test_clauses_are_bullet_points_where_sentences_are_too_few():
    answer, asked = "Take bread, some cheese, and an apple.", {"kind": "bullets", "count": 3}
    assert demonstrate(answer, [asked]) == "* Take bread.\n* Some cheese.\n* An apple."
    assert demonstrate("Take bread, cheese, and an apple.", [asked]) is None, "cheese alone says too little"


def test_demonstrations_follow_their_rules_and_change_no_prompt(folder):
    said = "Look in the shop, first of all. There are many. I go there each day. It is open now."
    rows = [json.loads(line) for line in gzip.decompress((folder / "one" / hh.FILE_NAME).read_bytes()).splitlines()]
    write(folder / "one" / hh.FILE_NAME, [row | {"chosen": said} for row in rows])
    without = build(str(folder / "one"), prompts=100, eval_prompts=20)
    roles = build(str(folder / "one"), prompts=100, eval_prompts=20, demonstrations=80)
    assert [len(roles[role]) for role in ("sft", "sft_eval")] == [80, 10]
    for role, held_out in (("sft", False), ("sft_eval", True)):
        for asked, reply in roles[role]["messages"]:
            assert (asked["role"], reply["role"]) == ("user", "assistant")
            assert is_held_out(asked["content"].split("\n\n")[0]) == held_out
            asks = [kind for kind in KINDS.values() if kind.held_out and kind.words({"count": 2, "word": "w"}) in asked["content"]]
            assert not asks, "a kind that no training prompt has"
        assert len({asked["content"].split("\n\n")[0] for asked, _ in roles[role]["messages"]}) == len(roles[role])
    assert roles["prompts"].to_dict() == without["prompts"].to_dict()
    with pytest.raises(UserError, match="questions make .* demonstrations and not 5000; set data.builder_args.demonstrations to"):
        build(str(folder / "one"), prompts=100, eval_prompts=20, demonstrations=5000)


def test_a_question_is_on_one_side_whatever_its_punctuation():
    texts = [f"Is this number {i} enough?" for i in range(2000)]
    assert all(is_held_out(text) == is_held_out(text.lower().replace("?", " ??")) for text in texts)
    assert 440 < sum(map(is_held_out, texts)) < 560  # a quarter: 500, deviation 19


def test_same_seed_same_rows_and_another_seed_others(folder):
    one, again, other = (build(str(folder), seed, prompts=50, eval_prompts=20)["prompts"].to_dict() for seed in (0, 0, 1))
    assert one == again != other


def test_one_corpus_is_enough_and_none_is_told(folder, tmp_path_factory):
    assert len(build(str(folder / "two"), prompts=100, eval_prompts=20)["prompts"]) == 100
    with pytest.raises(UserError, match="prompts = 5000 asks for 5000 questions of the self-dialogues"):
        build(str(folder / "two"), prompts=5000)
    with pytest.raises(UserError, match="holds neither"):
        build(str(tmp_path_factory.mktemp("empty")))


def test_the_reward_is_the_share_of_rules_followed():
    rules = json.dumps([{"kind": "no_commas"}, {"kind": "capitals"}])
    responses = ["ALL OF THIS IS LOUD", "all of this is quiet", "All, of this, is mixed", "", "NO"]
    columns = {"rules": [rules] * len(responses)}
    assert followed([""] * 5, responses, **columns) == [1, 0.5, 0, 0, 0]
    assert traits([""] * 5, responses, **columns) == {
        "trained_kinds": [1, 1, 0, 0, 0], "held_out_kinds": [1, 0, 0, 0, 0], "all_rules": [1, 0, 0, 0, 0],
    }  # fmt: skip

"""The data stage: tokens and chat templates."""


from data_rows import TEXT, USER, data_chat_tokenizer, data_tokenizer, encode_pair, limits_of, one, reply  # noqa: F401 - fixtures
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from rlhf_ray.data.chat import ChatFormat, drop_oldest_turn
from rlhf_ray.data.formats import normalise
from rlhf_ray.data.rules import Tally, apply_rules
from rlhf_ray.data.tokens import cut_text, encode_pairs, encode_prompt, encode_prompts, encode_texts
from rlhf_ray.models.tokenizer import load_tokenizer, train_tokenizer


def test_a_pair_is_prompt_ids_response_ids_eos(tokenizer):
    ids, prompt_length = encode_pair(tokenizer, "how to cook", " rice on the mat")
    prompt = tokenizer("how to cook").input_ids
    assert ids[:prompt_length] == prompt == encode_prompt(tokenizer, "how to cook")
    assert ids[prompt_length:-1] == tokenizer(" rice on the mat").input_ids
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids[:-1]) == "how to cook rice on the mat"


def test_a_plain_text_has_no_prompt(tokenizer):
    assert encode_pair(tokenizer, "", "the cat") == ([*tokenizer("the cat").input_ids, tokenizer.eos_token_id], 0)


def test_prompt_ids_do_not_depend_on_the_response(tokenizer):
    # Encoded together, "qui" + "ck" would merge into one token across the boundary.
    ids, prompt_length = encode_pair(tokenizer, "the qui", "ck brown")
    assert ids[:prompt_length] == encode_prompt(tokenizer, "the qui")
    assert ids[:-1] != tokenizer("the quick brown").input_ids


def test_one_at_a_time_and_many_at_once_agree_also_after_a_reload(tokenizer, tmp_path):
    prompts, responses = ["the cat", "", "Grüße 你好"], [" sat", TEXT, "\n\n  two"]
    tokenizer.save_pretrained(tmp_path)
    reloaded = load_tokenizer(tmp_path)
    expected = [encode_pair(tokenizer, p, r) for p, r in zip(prompts, responses, strict=True)]
    assert encode_pairs(tokenizer, prompts, responses) == expected
    assert encode_pairs(reloaded, prompts, responses) == expected
    assert encode_prompts(reloaded, prompts) == [ids[:n] for ids, n in expected]


def test_bos_stands_once_in_front_of_the_prompt(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    with_bos = load_tokenizer(tmp_path)
    with_bos.add_special_tokens({"bos_token": "<s>"})
    bos = with_bos.bos_token_id
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    plain = tokenizer("the cat").input_ids
    assert encode_pair(with_bos, "the cat", " sat")[0][: len(plain) + 1] == [bos, *plain]
    assert encode_prompt(with_bos, "<s>the cat") == [bos, *plain]  # a chat template wrote it already
    assert encode_pair(with_bos, "", "the cat") == ([bos, *plain, with_bos.eos_token_id], 1)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60), limit=st.integers(1, 12), side=st.sampled_from(["left", "right"]))
def test_cut_text_fits_and_is_an_end_of_the_text(text, limit, side):
    tokenizer = _cached_tokenizer()
    kept = cut_text(tokenizer, text, limit, side)
    assert len(encode_texts(tokenizer, [kept])[0]) <= limit
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert text.endswith(kept) if side == "left" else text.startswith(kept)
    if len(encode_texts(tokenizer, [text])[0]) <= limit:
        assert kept == text


def _cached_tokenizer(cache=[]):  # noqa: B006 - hypothesis runs the function many times
    if not cache:
        cache.append(train_tokenizer([TEXT] * 20, 400))
    return cache[0]


def test_the_tokenizers_template_is_used(chat_tokenizer):
    row = one({"messages": [USER, reply("Fine.")]}, "sft", ChatFormat(chat_tokenizer))
    assert row == {"prompt": "<|user|>How are you?<|eos|>\n<|assistant|>", "response": "Fine."}  # EOS comes by itself


def test_a_long_conversation_loses_its_oldest_turns(chat_tokenizer):
    system = {"role": "system", "content": "Be kind."}
    turns = [
        system,
        {"role": "user", "content": "the quick brown fox"},
        reply("jumps"),
        {"role": "user", "content": "the cat"},
    ]
    rows = normalise([{"prompt": turns}], {"prompt": "prompt"}, "prompts", ChatFormat(chat_tokenizer))
    full = len(encode_prompt(chat_tokenizer, rows[0]["prompt"]))
    short = "<|system|>Be kind.<|eos|>\n<|user|>the cat<|eos|>\n<|assistant|>"
    for limit in (full - 1, len(encode_prompt(chat_tokenizer, short))):  # the second: what is left just fits
        tally = Tally()
        kept = apply_rules([dict(row) for row in rows], "prompts", limits_of(chat_tokenizer, max_prompt_tokens=limit), tally)
        assert kept[0]["prompt"] == short
        assert tally.cut == {"prompt": 1}
    assert drop_oldest_turn([system, USER]) is None

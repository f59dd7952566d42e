"""Tokenizers: a byte-level BPE trained on the recipe's own text, or a Hugging Face one made safe for RLHF.

Safe means that EOS exists, and a PAD that ends no response. Where PAD is EOS, sequence classification pools the token
before EOS and a mask made from pad ids hides the one token that ends a reply.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from rlhf_ray.errors import UserError, whole_message
from rlhf_ray.models.chat_shape import end_ids
from rlhf_ray.models.control_tokens import ENDS_KEY
from rlhf_ray.models.generation_defaults import read_json
from rlhf_ray.models.hub import look_up
from rlhf_ray.tables.families import FAMILIES

EOS, PAD = "<|eos|>", "<|pad|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int, architecture: str = "gpt2") -> PreTrainedTokenizerBase:
    """Byte-level BPE (any text encodes, without UNK) with at most `vocab_size` entries, EOS and PAD included.

    Text is split into words as GPT-2 does, except for families like "qwen2" (`tables.families`): AutoTokenizer reads every
    tokenizer in a Qwen2 model's folder as a Qwen2Tokenizer, whatever the folder says, so it must be one.
    """
    like_qwen2 = FAMILIES.named(architecture).tokenizer == "qwen2"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if like_qwen2:
        like = Qwen2Tokenizer(unk_token=cast(str, None), eos_token=EOS, pad_token=PAD).backend_tokenizer  # no UNK
        tokenizer.normalizer, tokenizer.pre_tokenizer = like.normalizer, like.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if like_qwen2:
        learned = json.loads(tokenizer.to_str())["model"]
        merges = [tuple(merge) for merge in learned["merges"]]
        return Qwen2Tokenizer(  # transformers' annotations know neither merges as pairs nor a tokenizer without UNK
            vocab=learned["vocab"], merges=cast(list[str], merges), unk_token=cast(str, None), eos_token=EOS, pad_token=PAD,
            clean_up_tokenization_spaces=False,
        )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One token per word t0, t1, ...; text has spaces between them and encodes to the same ids. For benchmarks."""
    vocabulary = {f"t{i}": i for i in range(vocab_size - 2)} | {EOS: vocab_size - 2, PAD: vocab_size - 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


def load_tokenizer(path_or_name: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A folder's or the hub's tokenizer, with a PAD of its own (added if missing or a token that ends responses).

    It knows the tokens that end a response (`chat_shape.end_ids`): those of the model's generation_config beside EOS stay
    with it wherever it is saved. An added PAD may need one more row in the embeddings: `models.load.fit_embeddings`. Raises
    UserError if there is no tokenizer, or none with EOS.
    """
    look_up(path_or_name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path_or_name), trust_remote_code=trust_remote_code)
    except Exception as error:  # fault boundary: the tokenizers library raises a bare Exception for a broken file
        raise UserError(
            f"no tokenizer could be loaded from '{path_or_name}' ({whole_message(error)}); "
            "give a Hugging Face folder or hub name that holds one"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of '{path_or_name}' has no EOS token, so no reply could end; "
            'set "eos_token" in its tokenizer_config.json'
        )
    _refuse_ends_in_texts(tokenizer, path_or_name)
    ends = [*tokenizer.init_kwargs.get(ENDS_KEY, ()), *_declared_ends(path_or_name, tokenizer)]
    ends = [number for number in dict.fromkeys(ends) if number != tokenizer.eos_token_id]
    if ends:
        tokenizer.init_kwargs[ENDS_KEY] = ends
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in end_ids(tokenizer):
        tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer


def _refuse_ends_in_texts(tokenizer: PreTrainedTokenizerBase, path_or_name: str | Path) -> None:
    """UserError where a character that the tokenizer does not know becomes EOS, wherever in a text it stands."""
    if tokenizer.unk_token_id == tokenizer.eos_token_id:
        unknown = "\ue000\U0010fffd"  # private use: in no vocabulary, so either bytes or the unknown token
        if tokenizer.eos_token_id in tokenizer(unknown, add_special_tokens=False).input_ids:
            raise UserError(
                f"the tokenizer of '{path_or_name}' writes every character that it does not know as {tokenizer.eos_token!r}, which "
                'ends a text; give it an "unk_token" of its own in its tokenizer.json and tokenizer_config.json'
            )


def _declared_ends(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the model's generation_config (without it: its config) says ends a response.

    A single number counts where it is an added token: it may as well be the default of a config whose author set none.
    """
    values = read_json(path, "generation_config.json") or read_json(path, "config.json") or {}
    found = values.get("eos_token_id")
    if isinstance(found, int):
        found = [found] if found in tokenizer.added_tokens_decoder else []
    several = found if isinstance(found, list) else []
    return [number for number in several if isinstance(number, int) and 0 <= number < len(tokenizer)]


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of EOS. transformers' type of `eos_token_id` allows anything."""
    found = tokenizer.eos_token_id
    assert isinstance(found, int), "load_tokenizer lets no tokenizer without EOS through"
    return found


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of PAD."""
    found = tokenizer.pad_token_id
    assert isinstance(found, int), "load_tokenizer adds a PAD"
    return found


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of BOS. None: the tokenizer has none."""
    found = tokenizer.bos_token_id
    assert found is None or isinstance(found, int)
    return found


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int] | np.ndarray, *, special_tokens: bool) -> str:
    """The text of one sequence as it is. special_tokens: EOS, BOS and PAD are part of it."""
    text = tokenizer.decode(token_ids, skip_special_tokens=not special_tokens, clean_up_tokenization_spaces=False)
    assert isinstance(text, str), "one sequence gives one text"
    return text


def same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give every text the same ids: a model of the one can read ids of the other."""
    if one.get_vocab() != other.get_vocab() or one.eos_token_id != other.eos_token_id:
        return False
    probes = ["Two words, 12 numbers\n\nand  spaces: café.", " ", "\tCAF\u0045\u0301 \u2167 \ufb01"]
    return all(
        one(probe, add_special_tokens=False).input_ids == other(probe, add_special_tokens=False).input_ids for probe in probes
    )

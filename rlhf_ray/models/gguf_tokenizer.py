"""The tokenizer that a GGUF file describes: a byte-level BPE, its special tokens and its chat template.

It is built here from the file's own lists. transformers builds one too, but as the class of the model's family, which
splits text in that family's way: numbers that SmolLM2 reads digit by digit stay whole, and a saved folder reads otherwise
than the file says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_ray.errors import UserError

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # GGUF's kinds of tokens

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
#: tokenizer.ggml.pre, the way in which text is split into words before BPE -> its splitter
SPLITTERS = {
    **dict.fromkeys(("default", "gpt-2"), ()),
    **dict.fromkeys(("smollm", "starcoder"), (pre_tokenizers.Digits(individual_digits=True),)),
    "qwen2": (pre_tokenizers.Split(Regex(QWEN2), "isolated"),),
    **dict.fromkeys(("llama-bpe", "llama3"), (pre_tokenizers.Split(Regex(LLAMA3), "isolated"),)),
}
WHOLE_WORDS = ("llama-bpe", "llama3")  # these take a word that is a token as it is, without merges, and begin with BOS


def gguf_tokenizer(fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer of a file with these keys and values. UserError for a kind that this package does not build."""
    kind, split = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or split not in SPLITTERS:
        raise UserError(
            f"the file's tokenizer is of kind {kind!r} with words split as {split!r}, but only byte-level BPE ('gpt2') with "
            f"{', '.join(SPLITTERS)} is imported; take the model's Hugging Face folder instead"
        )
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split in WHOLE_WORDS))
    own_regex = split not in ("qwen2", *WHOLE_WORDS)  # GPT-2's, which ByteLevel brings along
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*SPLITTERS[split], pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own_regex)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in _of_kind(CONTROL, tokens, kinds)])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in _of_kind(USER_DEFINED, tokens, kinds)])
    special = {
        name: tokens[fields[key]]
        for name, key in (
            ("bos_token", "tokenizer.ggml.bos_token_id"), ("eos_token", "tokenizer.ggml.eos_token_id"),
            ("unk_token", "tokenizer.ggml.unknown_token_id"), ("pad_token", "tokenizer.ggml.padding_token_id"),
        ) if key in fields
    }  # fmt: skip
    if fields.get("tokenizer.ggml.add_bos_token", split in WHOLE_WORDS) and "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, chat_template=fields.get("tokenizer.chat_template"),
        model_max_length=fields.get(f"{fields['general.architecture']}.context_length"),
        additional_special_tokens=[token for token in _of_kind(CONTROL, tokens, kinds) if token not in special.values()],
        **special,
    )  # fmt: skip


def _of_kind(kind: int, tokens: list[str], kinds: list[int]) -> list[str]:
    return [token for token, each in zip(tokens, kinds, strict=True) if each == kind]

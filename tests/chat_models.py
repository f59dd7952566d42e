"""Chat templates as public models have them, and small tokenizers with the tokens that they write."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "How many apples are in the basket? There are seven apples, two pears and a plum. Seven apples. None.",
    "system user assistant model What is the capital of France? The capital of France is Paris.",
    "im start im end eot id begin of text end of turn start header You are a helpful assistant.",
    "naïve café, ÄÖÜ; 漢字 🙂 and <b>bold</b> text: a < b > c | d [1] {2}\n\n    indented\tline",
] * 8

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ bos_token + '[INST] ' + message['content'] | trim + ' [/INST]' }}{% endif %}{% endfor %}"
)
THINKING = (  # the prompt opens the reasoning, and replies are written without theirs
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + message['content'].split('</think>')[-1].strip() + eos_token }}"
    "{% else %}{{ '<|user|>' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
)
LOWERED = (  # lower-cases, looks into contents, and writes one directly behind the other
    "{% for message in messages %}{{ message['content'][0] | upper + message['content'][1:] | lower }}{% endfor %}"
    "{{ '<|sep|>' if add_generation_prompt else '<|done|>' }}"
)

#: name -> (template, EOS, PAD, BOS, other special tokens, added tokens that are not special)
MODELS = {
    "chatml": (CHATML, "<|im_end|>", "<|endoftext|>", None, ["<|im_start|>", "<|endoftext|>"], ["<tool>", "</tool>"]),
    "chatml, pad is eos": (CHATML, "<|im_end|>", "<|im_end|>", None, ["<|im_start|>"], []),
    "chatml, other eos": (CHATML, "<|endoftext|>", None, None, ["<|im_start|>", "<|im_end|>"], []),
    "llama 3": (LLAMA3, "<|end_of_text|>", None, "<|begin_of_text|>",
                ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], []),
    "gemma": (GEMMA, "<eos>", "<pad>", "<bos>", ["<start_of_turn>", "<end_of_turn>"], []),
    "llama 2": (LLAMA2, "</s>", None, "<s>", [], []),
    "thinking": (THINKING, "<|end|>", None, "<|begin|>", [], ["<|user|>", "<|assistant|>", "<think>", "</think>"]),
    "lowered": (LOWERED, "<|done|>", None, None, ["<|sep|>"], []),
    "base": (None, "<|endoftext|>", None, None, [], []),
}  # fmt: skip
KINDS = ("bytes", "pieces", "legacy pieces", "unigram")


def chat_tokenizer(name, kind="bytes"):
    """kind: byte-level BPE like GPT-2's; SentencePiece-like BPE (NFC, Metaspace at the text's beginning, or Llama's first
    normaliser); a Unigram model whose vocabulary holds the special tokens as pieces."""
    template, eos, pad, bos, special, added = MODELS[name]
    names = list(dict.fromkeys(one for one in ("<unk>", bos, eos, pad, *special) if one is not None))
    if kind == "bytes":
        inner, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "special_tokens": names[1:]}
    else:
        inner = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE(unk_token="<unk>", fuse_unk=True))
        trainer = trainers.UnigramTrainer if kind == "unigram" else trainers.BpeTrainer
        if kind == "legacy pieces":
            inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        else:
            inner.normalizer = normalizers.NFC()
            inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
            inner.decoder = decoders.Metaspace(prepend_scheme="first", split=True)
        options = {"special_tokens": names} | ({"unk_token": "<unk>"} if kind == "unigram" else {})
    inner.train_from_iterator(TEXTS, trainer(vocab_size=420, show_progress=False, **options))
    if bos is not None:
        place = inner.token_to_id(bos)
        inner.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, place)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=eos, pad_token=pad, bos_token=bos, clean_up_tokenization_spaces=False,
        extra_special_tokens=special,
    )  # fmt: skip
    tokenizer.add_tokens([AddedToken(one, special=False, normalized=False) for one in added])
    tokenizer.chat_template = template
    return tokenizer


def saved_tokenizer(name, folder, kind="bytes", ends=None):
    """The same as a folder that a model could stand in. ends: eos_token_id of its generation_config, as token names."""
    tokenizer = chat_tokenizer(name, kind)
    tokenizer.save_pretrained(folder)
    if ends is not None:
        ids = [tokenizer.convert_tokens_to_ids(one) for one in ends]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return folder

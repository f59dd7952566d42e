"""`rlhf-ray import`: a GGUF file in, a Hugging Face folder out.

A GGUF file is how llama.cpp keeps a model: quantised weights, config, tokenizer and chat template in one. transformers
turns its weights back into numbers; the folder then holds them as an ordinary model, which trains like any other. What
quantisation rounded away stays away.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from os import getpid
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rlhf_ray.errors import RunFailed, UserError
from rlhf_ray.models.target import refuse_taken

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("bfloat16", "float32")
MAGIC = b"GGUF"
MOST_CHANGE = 0.02  # of the perplexity of KNOWN_TEXT between the file's weights and the folder's; bfloat16 changes 0.001
KNOWN_TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. "
    "However little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is so "
    "well fixed in the minds of the surrounding families, that he is considered as the rightful property of some one or other "
    "of their daughters."
)
#: texts that a tokenizer must give back as they were
PROBES = (
    KNOWN_TEXT, "In 1969, 600 million people watched; 3.14159 is not 22/7.", "def f(x):\n    return x  **  12\n\n\n  7",
    "Caf\u00e9, na\u00efve, \u4f60\u597d, \u0645\u0631\u062d\u0628\u0627, \U0001f642!",
    " leading, trailing ", "DON'T SHOUT, it's  they'll\t\r\n we'Ve",
    "<|im_start|>user\nHello<|im_end|>\n", "",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What was written, and how it was checked."""

    folder: Path
    architecture: str
    parameters: int
    quantisation: str  # "Q4_1 210, F32 61": kinds of tensors in the file
    perplexity: float  # of KNOWN_TEXT under the folder's model
    file_perplexity: float  # the same under the file's weights in float32

    def __str__(self) -> str:
        return (
            f"{self.folder}: {self.architecture}, {self.parameters / 1e6:.0f} M parameters, from {self.quantisation}; "
            f"perplexity of a known text {self.perplexity:.3f} ({self.file_perplexity:.3f} with the file's weights), "
            f"{len(PROBES)} texts encoded and decoded"
        )


def import_gguf(file: Path, target: Path, dtype: str = "bfloat16") -> Imported:
    """Write `target` from `file`, whole or not at all.

    UserError where `file` is not a whole GGUF file of a model that transformers knows, or `target` is taken. RunFailed where
    the written folder does not read as the file does.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is neither bfloat16 nor float32")
    refuse_taken(target)
    fields, kinds = read_fields(file)
    from rlhf_ray.models.gguf_tokenizer import gguf_tokenizer
    from rlhf_ray.models.save import save_model

    tokenizer = gguf_tokenizer(fields)
    model = _dequantised(file, tokenizer)
    file_perplexity = _perplexity(model, tokenizer)
    quantisation = ", ".join(f"{name} {count}" for name, count in kinds.most_common())
    parameters = sum(each.numel() for each in model.parameters())
    temporary = target.with_name(f".{target.name}.{getpid()}.import")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_model(_cast(model, dtype), tokenizer, temporary, _card(file, fields, quantisation, dtype))
        perplexity = _check(temporary, tokenizer, file_perplexity)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Imported(
        folder=target, architecture=fields["general.architecture"], parameters=parameters, quantisation=quantisation,
        perplexity=perplexity, file_perplexity=file_perplexity,
    )  # fmt: skip


def read_fields(file: Path) -> tuple[dict[str, Any], Counter[str]]:
    """(keys and values of the file's head, kinds of tensors and how many there are of each)."""
    if not file.is_file():
        raise UserError(f"{file} is {'a folder' if file.is_dir() else 'not there'}; name a GGUF file")
    with open(file, "rb") as opened:
        if opened.read(len(MAGIC)) != MAGIC:
            raise UserError(f"{file} is not a GGUF file (it does not begin with 'GGUF'); name a file that ends in .gguf")
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError("GGUF files are read by the package 'gguf'; install it with: pip install gguf") from None
    try:
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError) as error:  # it reads past the end of a short file
        raise UserError(f"{file} is cut short or damaged ({error}); download it again") from None
    if "general.architecture" not in fields:
        raise UserError(f"{file} names no architecture (general.architecture); it holds no language model")
    return fields, Counter(tensor.tensor_type.name for tensor in reader.tensors)


def _dequantised(file: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The file's model in float32, as a model like any other: its token ids are the tokenizer's, nothing says GGUF."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        found = AutoModelForCausalLM.from_pretrained(
            str(file.absolute().parent), gguf_file=file.name, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"transformers makes no language model of {file} ({first}); import another model") from error
    finally:
        logging.set_verbosity(verbosity)
    loaded, info = cast("tuple[PreTrainedModel, dict[str, Any]]", found)
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"{file} has no weights for {', '.join(missing[:3])}{' and others' if missing[3:] else ''}")
    given = loaded.config.to_dict()
    values = {key: value for key, value in given.items() if key not in ("quantization_config", "_model_name_or_path")}
    config = type(loaded.config).from_dict(values)
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in _special(tokenizer).items()}
    for name, token_id in ids.items():
        setattr(config, name, token_id)
    # A model that was loaded from a GGUF file refuses to be saved.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(**ids)
    return model.eval()


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    found = {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token, "pad": tokenizer.pad_token}
    return {name: token for name, token in found.items() if isinstance(token, str)}


def _cast(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    import torch

    cast(torch.nn.Module, model).to({"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype])
    return model


def _perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Of KNOWN_TEXT."""
    import torch

    ids = torch.tensor([tokenizer(KNOWN_TEXT, add_special_tokens=False).input_ids])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss.exp())


def _check(folder: Path, tokenizer: PreTrainedTokenizerBase, expected: float) -> float:
    """The perplexity of KNOWN_TEXT under the folder's model. RunFailed if it or the tokenizer reads other than the file's."""
    from transformers import AutoTokenizer

    from rlhf_ray.models.load import load_causal_lm

    read = AutoTokenizer.from_pretrained(str(folder))
    for text in PROBES:
        ids = read(text, add_special_tokens=False).input_ids
        back = read.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if back != text or ids != tokenizer(text, add_special_tokens=False).input_ids:
            raise RunFailed(f"the written tokenizer reads {text!r:.60} as {back!r:.60}; nothing was imported")
    found = _perplexity(load_causal_lm(folder), read)
    if not abs(found - expected) <= MOST_CHANGE * expected:
        raise RunFailed(
            f"the written model's perplexity of a known text is {found:.4g}, and {expected:.4g} with the file's weights; "
            "nothing was imported"
        )
    return found


def _card(file: Path, fields: Mapping[str, Any], quantisation: str, dtype: str) -> str:
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    with suppress(KeyError):
        front.append(f"license: {fields['general.license']}")
    return "\n".join([
        *front, "---", "",
        f"# {fields.get('general.name', file.stem)}", "",
        f"Imported from `{file.name}` by rlhf_ray. The file's tensors are {quantisation}; here they are dequantised to {dtype}.",
        "What quantisation rounded away is not in them: they differ from the weights that the file was made of.", "",
    ])  # fmt: skip

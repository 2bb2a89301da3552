"""What a tokenizer makes of captions: how many are cut, and how much of them it does not know."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from blip_scale.config.recipe import TextRecipe
from blip_scale.data.captions import clean_caption, is_long
from blip_scale.data.conversion.pairs import RawPair
from blip_scale.data.shards import Record
from blip_scale.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CUT = "captions cut to --max-words"
CUT_AT_A_SENTENCE = "of them at a sentence end"
LONG = f"captions of more than {TextRecipe.max_tokens} tokens"
TOKENS = "tokens"
UNKNOWN = "unknown tokens"
MOST_UNKNOWN = 0.2
"""Share of unknown tokens above which a tokenizer does not fit the captions."""


@lru_cache(maxsize=2)
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """Raises OSError or ValueError where it can't be loaded."""
    return load_tokenizer(TextRecipe(checkpoint=None, tokenizer=name))


def count_tokens(tokenizer: PreTrainedTokenizerFast, caption: str) -> tuple[int, int]:
    """Tokens of a caption with [CLS] and [SEP], and how many of them are [UNK]."""
    tokens = tokenizer(caption, return_attention_mask=False)["input_ids"]
    return len(tokens), tokens.count(tokenizer.unk_token_id)


def count_text(pair: RawPair, record: Record, max_words: int, tokenizer: str) -> Counter[str]:
    """What is to be said about the captions of a written pair; `tokenizer` "" counts no tokens."""
    counts: Counter[str] = Counter()
    found = pair.captions if isinstance(pair.captions, list) else [pair.captions]
    for caption in found:
        if isinstance(caption, str) and not pair.is_question and is_long(caption, max_words):
            counts[CUT] += 1
            counts[CUT_AT_A_SENTENCE] += clean_caption(caption, max_words) not in record.captions
    for caption in record.captions if tokenizer else ():
        tokens, unknown = count_tokens(tokenizer_of(tokenizer), caption)
        counts[TOKENS] += tokens - 2
        counts[UNKNOWN] += unknown
        counts[LONG] += tokens > TextRecipe.max_tokens
    return counts


def text_summary(tallies: Counter[str]) -> dict[str, Any]:
    """The entry `text` of a summary; takes what it tells out of `tallies`."""
    told: dict[str, Any] = {name: tallies.pop(name, 0) for name in (CUT, CUT_AT_A_SENTENCE)}
    tokens, unknown, long = (tallies.pop(name, 0) for name in (TOKENS, UNKNOWN, LONG))
    if tokens:
        told |= {LONG: long, "share of unknown tokens": round(unknown / tokens, 4)}
    return told

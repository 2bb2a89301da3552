"""Count captions that are cut, and tokens that are unknown to a tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from blip_scale.config.model_recipe import TextRecipe
from blip_scale.data.captions import RoleText, clean_caption, is_long
from blip_scale.data.conversion.pairs import RawPair
from blip_scale.data.shards import Record
from blip_scale.data.tokenizer import MOST_UNKNOWN, count_tokens, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CUT = "captions_cut"
CUT_AT_A_SENTENCE = "captions_cut_at_a_sentence"
LONG = "captions_over_max_tokens"
TOKENS = "tokens"
UNKNOWN = "unknown_tokens"


@lru_cache(maxsize=2)
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer once per process.

    Raises:
        OSError, ValueError: the tokenizer can't be loaded.
    """
    return load_tokenizer(TextRecipe(checkpoint=None, tokenizer=name))


def count_text(pair: RawPair, record: Record, max_words: int, tokenizer: str) -> Counter[str]:
    """Return counts for the captions of a written pair. With `tokenizer` "", count no tokens."""
    counts: Counter[str] = Counter()
    captions = pair.captions if isinstance(pair.captions, list) else [pair.captions]
    for item in captions:
        caption = item.text if isinstance(item, RoleText) else item
        if isinstance(caption, str) and not pair.is_question and is_long(caption, max_words):
            counts[CUT] += 1
            counts[CUT_AT_A_SENTENCE] += clean_caption(caption, max_words) not in record.captions
    for caption in record.captions if tokenizer else ():
        tokens, unknown = count_tokens(tokenizer_of(tokenizer), caption)
        counts[TOKENS] += tokens - 2
        counts[UNKNOWN] += unknown
        counts[LONG] += tokens > TextRecipe.max_tokens
    return counts


def text_summary(tallies: Counter[str]) -> dict[str, int]:
    """Remove the text counts from `tallies`, and return them as the entry `text` of a summary."""
    names = (CUT, CUT_AT_A_SENTENCE, LONG, TOKENS, UNKNOWN)
    counts = {name: tallies.pop(name, 0) for name in names}
    return {name: count for name, count in counts.items() if counts[TOKENS] or name in names[:2]}


def text_lines(counts: Mapping[str, int], max_words: int) -> list[str]:
    """Describe the result of `text_summary` in sentences."""
    lines = []
    if counts.get(CUT):
        lines.append(
            f"{counts[CUT]} captions have more than {max_words} words and are cut (--max-words), "
            f"{counts[CUT_AT_A_SENTENCE]} of them at the end of a sentence"
        )
    if counts.get(LONG):
        lines.append(
            f"{counts[LONG]} captions have more than {TextRecipe.max_tokens} tokens: training cuts "
            "them (model.text.max_tokens)"
        )
    if counts.get(TOKENS):
        share = counts[UNKNOWN] / counts[TOKENS]
        advice = ": another tokenizer is needed" if share > MOST_UNKNOWN else ""
        lines.append(f"{share:.1%} of all tokens are [UNK], unknown to the tokenizer{advice}")
    return lines

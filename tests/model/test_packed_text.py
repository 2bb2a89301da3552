"""Packed text: concatenating, choosing, splitting."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from blip_scale.model.packing import PackedText
from blip_scale.model.text import SpecialTokens, TextConfig

LISTS = [[1, 7, 8, 2], [1, 2], [1, 7, 8, 9, 2]]


def as_lists(text: PackedText) -> list[list[int]]:
    offsets = text.segments.offsets.tolist()
    assert text.segments.max_length >= max(b - a for a, b in pairwise(offsets))
    assert text.segments.offsets.dtype == torch.int32
    return [text.token_ids[a:b].tolist() for a, b in pairwise(offsets)]


def test_round_trip_positions_and_sequences() -> None:
    text = PackedText.from_lists(LISTS)
    assert as_lists(text) == LISTS
    sequences = text.segments.sequence_of(11)
    assert sequences.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert text.segments.positions(sequences).tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4]
    assert text.first_rows.tolist() == [0, 4, 6]


def test_first_token_is_replaced_in_a_copy() -> None:
    text = PackedText.from_lists(LISTS)
    assert as_lists(text.with_first_token(3)) == [[3, *ids[1:]] for ids in LISTS]
    assert as_lists(text) == LISTS


def test_select() -> None:
    text = PackedText.from_lists(LISTS)
    chosen = text.select(torch.tensor([2, 0, 0]))
    assert as_lists(chosen) == [LISTS[2], LISTS[0], LISTS[0]]


def test_split_targets() -> None:
    text, targets = PackedText.from_lists(LISTS).split_targets()
    assert as_lists(text) == [ids[:-1] for ids in LISTS]
    assert targets.tolist() == [token for ids in LISTS for token in ids[1:]]


def test_impossible_sizes_are_refused() -> None:
    special = SpecialTokens(pad=0, cls=1, sep=2, enc=3, dec=60)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        TextConfig(special, vocab_size=60)
    with pytest.raises(ValueError, match="heads"):
        TextConfig(special, width=32, heads=5)

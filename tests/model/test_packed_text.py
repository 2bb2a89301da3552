"""Packed text: concatenating, choosing, splitting."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from blip_scale.model.packing import IGNORED, PackedText, Room, select_from_table
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


@pytest.mark.parametrize("chosen", [[2, 0, 0], [1, 1, 1], [2, 2, 2]])
def test_selected_text_is_filled_up(chosen: list[int]) -> None:
    """Any selection, from the text or from a table of it, is filled up to the same size."""
    room = Room.between(6, 15, 5)
    text, index = PackedText.from_lists(LISTS), torch.tensor(chosen)
    for filled in (text.select(index, room), select_from_table(text.table(5), index, room)):
        sequences = as_lists(filled)
        assert filled.count == 3 and sequences[:3] == [LISTS[i] for i in chosen]
        assert len(filled.token_ids) == room.tokens and filled.fillers == room.fillers
        assert all(2 <= len(ids) <= 5 for ids in sequences[3:])
        assert filled.first_rows.tolist() == filled.segments.offsets[:3].tolist()
        marked = as_lists(filled.with_first_token(3))
        assert [ids[0] for ids in marked[:3]] == [3] * 3 and marked[3:] == sequences[3:]


@pytest.mark.parametrize(("fewest", "most", "max_length"), [(6, 90, 30), (40, 41, 3), (9, 9, 8)])
def test_a_room_fits_its_texts_and_no_others(fewest: int, most: int, max_length: int) -> None:
    room = Room.between(fewest, most, max_length)
    assert room.tokens % 8 == 0
    fits = [tokens for tokens in range(500) if room.fits(torch.tensor(tokens), max_length)]
    assert set(fits) >= set(range(fewest, most + 1)) and fits == list(range(fits[0], fits[-1] + 1))
    for tokens in fits:
        ends = room.filler_ends(torch.tensor(tokens, dtype=torch.int32)).tolist()
        lengths = [b - a for a, b in pairwise([tokens, *ends])]
        assert len(lengths) == room.fillers and sum(lengths) + tokens == room.tokens
        assert all(2 <= length <= max_length for length in lengths)


def test_fillers_have_no_targets() -> None:
    room = Room.between(6, 15, 5)
    text, targets = PackedText.from_lists(LISTS).select(torch.arange(3), room).split_targets()
    expected = [token for ids in LISTS for token in ids[1:]]
    assert targets[: len(expected)].tolist() == expected
    assert set(targets[len(expected) :].tolist()) == {IGNORED}
    assert text.fillers == room.fillers and len(text.token_ids) == len(targets)


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

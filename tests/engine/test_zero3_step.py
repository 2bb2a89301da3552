"""The shorter ways through DeepSpeed's ZeRO-3 step."""

from __future__ import annotations

import torch

from blip_scale.engine.zero3_step import joined


def test_pieces_that_lie_end_to_end_are_one_view() -> None:
    flat = torch.arange(10.0)
    whole = joined([flat[2:5], flat[5:6], flat[6:10]])
    assert whole is not None
    assert torch.equal(whole, flat[2:])
    whole.zero_()
    assert flat.tolist() == [0.0, 1.0] + 8 * [0.0]


def test_other_pieces_are_not() -> None:
    flat = torch.arange(10.0)
    assert joined([flat[:3], flat[4:]]) is None  # a gap
    assert joined([flat[4:], flat[:4]]) is None  # another order
    assert joined([flat[:4], torch.arange(6.0)]) is None  # another storage
    assert joined([flat[:4], flat[4:8].view(2, 2)]) is None
    assert joined([flat[:4].view(torch.int32), flat[4:]]) is None

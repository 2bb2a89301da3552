"""The VisDial network: its dialog encoder sees image and caption, in batches as one by one."""

from __future__ import annotations

import torch
from tiny_med import CLS, ENC, SEP, MakeMED, tiny_config
from torch import Tensor

from blip_scale.model.initialization import fill_from_med
from blip_scale.model.med import MED
from blip_scale.model.packing import ImageIndex, PackedText, plan_pass
from blip_scale.model.visdial import VisDial

DIALOGS = [[ENC, 30, 31, 32, SEP], [ENC, 33, SEP], [ENC, 34, 35, SEP], [ENC, 30, 36, 37, 38, SEP]]
OWNERS = torch.tensor([2, 0, 0, 3])


@torch.no_grad()
def test_context_is_image_and_caption(
    make_med: MakeMED, images: Tensor, sentences: list[list[int]]
) -> None:
    """Compare with MED's encoders, whose cross-attention reads image tokens and caption states.

    Image and text have equal widths, so no projection is needed.
    """
    config = tiny_config(width=24, heads=2)
    med: MED = make_med(width=24, heads=2).eval()
    network = VisDial(config).eval()
    assert fill_from_med(network, dict(med.named_parameters()), seed=0) == []
    captions = PackedText.from_lists(sentences)
    context = network.encode_context(images, captions)
    logits = network.match(PackedText.from_lists(DIALOGS), context, OWNERS)
    embeds = med.encode_image(images)
    for number, (dialog, owner) in enumerate(zip(DIALOGS, OWNERS.tolist(), strict=True)):
        caption = sentences[owner]
        # The plan of a decoder reads all rows; the layout of an encoder is bidirectional.
        whole = plan_pass(None, PackedText.from_lists([caption]), None, False)
        layout = plan_pass(PackedText.from_lists([caption]), None, None, False).encoder
        hidden = med.text.embeddings(whole.token_ids, whole.positions)
        for layer in med.text.layers:
            hidden = layer.mlp(layer.self_attention_encoder(hidden, layout))
        seen = torch.cat([embeds[owner], hidden])[None]
        index = ImageIndex(1, seen.shape[1], torch.zeros(1, dtype=torch.int64))
        plan = plan_pass(PackedText.from_lists([dialog]), None, index, False)
        expected = med.itm_head(med.text(plan, seen))
        torch.testing.assert_close(logits[number], expected[0], atol=1e-5, rtol=1e-5)


def test_other_widths_are_brought_together(make_med: MakeMED, images: Tensor) -> None:
    """Only the projection of caption states is random, and it has a gradient."""
    network = VisDial(tiny_config())
    drawn = fill_from_med(network, dict(make_med().named_parameters()), seed=0)
    assert drawn == ["caption_proj.weight", "caption_proj.bias"]
    captions = PackedText.from_lists([[CLS, 7, SEP]] * len(images))
    context = network.encode_context(images, captions)
    network.match(PackedText.from_lists(DIALOGS), context, OWNERS).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())

"""FLOPs by formula against PyTorch's counter on a whole step, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from blip_scale.config import recipe as recipes
from blip_scale.model.flops import (
    at_image_size,
    captioning_flops,
    med_flops,
    momentum_contrast_flops,
    pretraining_flops,
    recomputation_flops,
)
from blip_scale.model.initialization import init_weights
from blip_scale.model.med import MED, MEDConfig, MomentumEncoder
from blip_scale.model.packing import PackedText
from blip_scale.model.text import SpecialTokens, TextConfig
from blip_scale.model.vision import VisionConfig

SPECIAL = SpecialTokens(pad=0, cls=1, sep=2, enc=4, dec=3)
PAIRS, LENGTH, QUEUE = 4, 9, 96


def config(depth: int, layers: int, checkpointing: bool = False, **options: float) -> MEDConfig:
    sizes = {"embed_dim": 48, "depth": depth, "num_heads": 3, "patch_size": 8}
    text = TextConfig(SPECIAL, 500, 64, layers, 4, 192, 16)
    vision = VisionConfig("vit_tiny_patch16_224", 48, sizes, **options)
    return MEDConfig(vision, text, 32, gradient_checkpointing=checkpointing)


def step(
    med: MED,
    momentum: MomentumEncoder,
    images: torch.Tensor,
    text: PackedText,
    with_lm: bool = True,
) -> None:
    embeds = med.encode_image(images)
    online = (med.project_image(embeds), med.project_text(med.encode_text(text)))
    with torch.no_grad():
        keys = momentum.project_image(momentum.encode_image(images))
        momentum_text = momentum.project_text(momentum.encode_text(text))
        all_keys = torch.cat([keys, torch.randn(QUEUE, 32)]).T
        targets = [x @ all_keys for x in (keys, momentum_text)]
    loss = sum((x @ all_keys * t).sum() for x, t in zip(online, targets, strict=True))
    enc, every = text.with_first_token(SPECIAL.enc), torch.arange(PAIRS)
    pairs = enc.select(torch.cat([every, every, every.roll(1)]))
    index = torch.cat([every, every.roll(1), every])
    if not with_lm:
        (loss + med.match(pairs, embeds, index).sum()).backward()
        return
    itm, logits, lm_targets = med.sweep(
        pairs, text.with_first_token(SPECIAL.dec), embeds, index, every
    )
    (loss + itm.sum() + F.cross_entropy(logits, lm_targets)).backward()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(
    ("depth", "layers", "options"),
    [
        (2, 1, {}),
        (1, 3, {}),
        (3, 3, {}),
        (3, 2, {"patch_dropout": 0.5}),
        (3, 2, {"frozen_layers": 2}),
        (2, 1, {"patch_dropout": 0.25, "frozen_layers": 2}),
    ],
)
def test_paper_and_counter_agree(
    depth: int, layers: int, options: dict[str, float], checkpointing: bool
) -> None:
    settings = config(depth, layers, checkpointing, **options)
    med, momentum = MED(settings), MomentumEncoder(settings)
    init_weights(med, seed=0)
    images = torch.randn(PAIRS, 3, 48, 48)
    text = PackedText.from_lists([[1, *range(5, 5 + LENGTH - 2), 2]] * PAIRS)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(med, momentum, images, text)
    counted = counter.get_total_flops()
    paper = pretraining_flops(med.config, PAIRS, PAIRS * LENGTH, QUEUE)
    if checkpointing:
        paper += recomputation_flops(med.config, PAIRS, PAIRS * LENGTH)
    assert paper == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(("depth", "layers"), [(2, 1), (3, 3)])
def test_fine_tuning_counts_its_own_parts(depth: int, layers: int) -> None:
    settings = config(depth, layers)
    med, momentum = MED(settings), MomentumEncoder(settings)
    init_weights(med, seed=0)
    images = torch.randn(PAIRS, 3, 48, 48)
    text = PackedText.from_lists([[1, *range(5, 5 + LENGTH - 2), 2]] * PAIRS)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(med, momentum, images, text, with_lm=False)
    paper = med_flops(settings, PAIRS, PAIRS * LENGTH, decodes=False)
    paper += momentum_contrast_flops(settings, PAIRS, PAIRS * LENGTH, QUEUE)
    assert paper == pytest.approx(counter.get_total_flops(), rel=0.02)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        inputs, targets = text.with_first_token(SPECIAL.dec).split_targets()
        logits = med.decode(inputs, med.encode_image(images), torch.arange(PAIRS))
        F.cross_entropy(logits, targets).backward()
    paper = captioning_flops(settings, PAIRS, PAIRS * LENGTH)
    assert paper == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("image_size", [48, 24])
@pytest.mark.parametrize("decodes", [True, False])
def test_pretraining_without_itm_and_with_smaller_images(decodes: bool, image_size: int) -> None:
    settings = config(3, 3)
    settings = replace(settings, vision=replace(settings.vision, other_sizes=(24,)))
    med = MED(settings)
    init_weights(med, seed=0)
    images = torch.randn(PAIRS, 3, image_size, image_size)
    text = PackedText.from_lists([[1, *range(5, 5 + LENGTH - 2), 2]] * PAIRS)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        embeds = med.encode_image(images)
        loss = (med.project_image(embeds) * med.project_text(med.encode_text(text))).sum()
        if decodes:
            inputs, targets = text.with_first_token(SPECIAL.dec).split_targets()
            logits = med.decode(inputs, embeds, torch.arange(PAIRS))
            loss = loss + F.cross_entropy(logits, targets)
        loss.backward()
    small = at_image_size(settings, image_size)
    paper = med_flops(small, PAIRS, PAIRS * LENGTH, decodes, matches=False)
    assert paper == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_published_size() -> None:
    """ViT-B/16 at 224 pixels takes 194 GFLOP per pair with captions of 12.5 tokens.

    The published code takes 307.
    """
    text = TextConfig(SpecialTokens(pad=0, cls=101, sep=102, enc=30523, dec=30522))
    flops = pretraining_flops(MEDConfig(VisionConfig(), text), 8, 100, 57600)
    assert flops / 8 == pytest.approx(194e9, rel=0.02)


def test_the_fast_recipe_takes_the_stated_share_of_the_flops() -> None:
    """44 % of `base_14M`, as the recipe's first line and docs/performance.md say."""
    text = TextConfig(SpecialTokens(pad=0, cls=101, sep=102, enc=30523, dec=30522))
    fast = recipes.load("base_14M_fast")
    epochs = fast.train.epochs

    def flops(image_size: int, patch_dropout: float) -> float:
        vision = VisionConfig(image_size=image_size, patch_dropout=patch_dropout)
        return pretraining_flops(MEDConfig(vision, text), 90, 1125, 57600)

    total, begin = 0.0, 0.0
    for stage in fast.data.image_sizes:
        vision = fast.model.vision
        total += (stage.until_epoch - begin) * flops(stage.size, vision.patch_dropout)
        begin = stage.until_epoch
    total += (epochs - begin) * flops(vision.image_size, vision.patch_dropout)
    assert total / epochs / flops(224, 0.0) == pytest.approx(0.436, abs=0.001)

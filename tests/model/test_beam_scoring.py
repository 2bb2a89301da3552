"""Beam search by the published rule, against the rule written out one hypothesis at a time.

The rule is that of transformers 4.15. The score of a finished hypothesis is its log-probability
divided by length ** length_penalty, where the length counts the prompt but not [SEP]. An image is
done when no running hypothesis, by its length so far, can beat the worst of the K that are kept.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blip_scale.model.generation import BeamSettings, Scoring, caption_beam
from blip_scale.model.initialization import init_weights
from blip_scale.model.med import MED, MEDConfig
from blip_scale.model.packing import PackedText
from blip_scale.model.text import SpecialTokens, TextConfig
from blip_scale.model.vision import VisionConfig

SEP, DEC = 2, 4
MAX_LENGTH, MIN_LENGTH = 10, 5


def random_med(seed: int) -> MED:
    """A MED whose weights are large enough that captions end at different lengths."""
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8}
    special = SpecialTokens(pad=0, cls=1, sep=SEP, enc=3, dec=DEC)
    text = TextConfig(
        special, vocab_size=24, width=24, layers=2, heads=2, mlp_width=48, dropout=0.0
    )
    med = MED(MEDConfig(VisionConfig("vit_tiny_patch16_224", 16, sizes), text, 12))
    init_weights(med, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in med.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return med.eval()


def published_caption(
    med: MED, embeds_1ND: Tensor, prompt: list[int], beams: int, length_penalty: float
) -> list[int]:
    """The best caption of one image by the published rule."""
    running: list[tuple[float, list[int]]] = [(0.0, prompt)]
    kept: list[tuple[float, list[int]]] = []
    while True:
        length = len(running[0][1])
        texts = PackedText.from_lists([tokens for _, tokens in running])
        looks_at = torch.zeros(len(running), dtype=torch.int64)
        logits = med.decode(texts, embeds_1ND, looks_at).unflatten(0, (len(running), length))
        log_probabilities = logits[:, -1].log_softmax(-1)
        candidates = []
        for row, (total, tokens) in enumerate(running):
            for token in range(med.config.text.vocab_size):
                if token != SEP or length >= MIN_LENGTH:
                    value = total + float(log_probabilities[row, token])
                    candidates.append((value, [*tokens, token]))
        candidates.sort(key=lambda candidate: -candidate[0])
        running = []
        for place, (value, tokens) in enumerate(candidates):
            if tokens[-1] != SEP:
                running.append((value, tokens))
            elif place < beams:
                kept.append((value / length**length_penalty, tokens[:-1]))
            if len(running) == beams:
                break
        kept = sorted(kept, key=lambda hypothesis: -hypothesis[0])[:beams]
        hope = candidates[0][0] / length**length_penalty
        if len(kept) == beams and kept[-1][0] >= hope:
            break
        if length + 1 == MAX_LENGTH:
            kept += [(value / MAX_LENGTH**length_penalty, tokens) for value, tokens in running]
            break
    return max(kept, key=lambda hypothesis: hypothesis[0])[1][len(prompt) :]


def captions(
    med: MED, embeds: Tensor, prompt: list[int], beams: int, penalty: float, scoring: Scoring
) -> list[list[int]]:
    settings = BeamSettings(beams, MAX_LENGTH, MIN_LENGTH, penalty, scoring=scoring)
    return caption_beam(med, embeds, prompt, settings)


@torch.no_grad()
@pytest.mark.parametrize("beams", [2, 3, 5])
@pytest.mark.parametrize("length_penalty", [1.0, 0.5, 2.0])
def test_the_published_rule(beams: int, length_penalty: float) -> None:
    for seed in range(4):
        med = random_med(seed)
        generator = torch.Generator().manual_seed(seed)
        embeds = med.encode_image(torch.randn(3, 3, 16, 16, generator=generator))
        for prompt in ([DEC], [DEC, 7, 9]):
            expected = []
            for embeds_1ND in embeds.split(1):
                caption = published_caption(med, embeds_1ND, prompt, beams, length_penalty)
                expected.append(caption)
            assert captions(med, embeds, prompt, beams, length_penalty, "published") == expected


@torch.no_grad()
def test_the_rules_differ_with_beams_alone() -> None:
    """If the two rules never differed, the test above could not tell them apart."""
    beams = (1, 2, 5)
    differences = dict.fromkeys(beams, 0)
    for seed in range(25):
        med = random_med(seed)
        generator = torch.Generator().manual_seed(seed)
        embeds = med.encode_image(torch.randn(4, 3, 16, 16, generator=generator))
        for width in beams:
            published = captions(med, embeds, [DEC, 7, 9], width, 2.0, "published")
            huggingface = captions(med, embeds, [DEC, 7, 9], width, 2.0, "huggingface")
            differences[width] += published != huggingface
    assert differences[1] == 0 and differences[2] + differences[5] > 0

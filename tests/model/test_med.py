"""MED in one sweep against a plain padded reference in four passes, and MED's other guarantees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blip_scale.model.initialization import init_weights
from blip_scale.model.med import MED, MomentumEncoder, Temperature
from blip_scale.model.packing import PackedText

NEGATIVE_IMAGES, NEGATIVE_TEXTS = torch.tensor([2, 2, 0, 2]), torch.tensor([3, 0, 3, 3])
SMOOTHING = 0.1


class Plain:
    """BLIP as published: padded text, dense masks, one pass per use, attention written out."""

    def __init__(self, med: MED) -> None:
        self.config = med.config
        self.weights: Mapping[str, Tensor] = dict(med.named_parameters())
        self.heads = med.config.text.heads

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        shape = (x.shape[-1],)
        return F.layer_norm(
            x, shape, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps
        )

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None) -> Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores + (~mask) * -10000.0
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def encode_image(self, images: Tensor) -> Tensor:
        w = self.weights
        patches = F.conv2d(
            images, w["vision.patch_embed.proj.weight"], w["vision.patch_embed.proj.bias"], stride=8
        )
        x = patches.flatten(2).transpose(1, 2)
        x = torch.cat([w["vision.cls_token"].expand(len(x), -1, -1), x], 1) + w["vision.pos_embed"]
        for i in range(3):
            block = f"vision.blocks.{i}"
            q, k, v = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6)).chunk(
                3, -1
            )
            x = x + self.linear(f"{block}.attn.proj", self.attend(q, k, v, 2, None))
            hidden = self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6))
            x = x + self.linear(f"{block}.mlp.fc2", F.gelu(hidden))
        return self.norm("vision.norm", x, 1e-6)

    def text(
        self, ids: Tensor, mask: Tensor, image_embeds: Tensor | None, decoder: bool = False
    ) -> Tensor:
        """Ids and mask [S, L] and image_embeds [S, N, D] (or None) to hidden states [S, L, D]."""
        w, length = self.weights, ids.shape[1]
        x = w["text.embeddings.word.weight"][ids] + w["text.embeddings.position.weight"][:length]
        x = self.norm("text.embeddings.norm", x, 1e-12)
        visible = mask[:, None, None, :].expand(-1, 1, length, -1)
        if decoder:
            visible = visible & torch.ones(length, length, dtype=torch.bool).tril()
        for i in range(self.config.text.layers):
            layer = f"text.layers.{i}"
            attention = f"{layer}.self_attention_{'decoder' if decoder else 'encoder'}"
            q, k, v = self.linear(f"{attention}.qkv", x).chunk(3, -1)
            context = self.linear(f"{attention}.output", self.attend(q, k, v, self.heads, visible))
            x = self.norm(f"{attention}.norm", x + context, 1e-12)
            if image_embeds is not None:
                cross = f"{layer}.cross_attention"
                k, v = self.linear(f"{cross}.key_value", image_embeds).chunk(2, -1)
                context = self.attend(self.linear(f"{cross}.query", x), k, v, self.heads, None)
                x = self.norm(f"{cross}.norm", x + self.linear(f"{cross}.output", context), 1e-12)
            hidden = F.gelu(self.linear(f"{layer}.mlp.fc1", x))
            x = self.norm(f"{layer}.mlp.norm", x + self.linear(f"{layer}.mlp.fc2", hidden), 1e-12)
        return x

    def lm_logits(self, x: Tensor) -> Tensor:
        x = self.norm("lm_head.norm", F.gelu(self.linear("lm_head.dense", x)), 1e-12)
        return F.linear(
            x, self.weights["text.embeddings.word.weight"], self.weights["lm_head.bias"]
        )


def contrastive(image: Tensor, text: Tensor, temperature: Tensor) -> Tensor:
    """ITC against fixed keys and soft targets."""
    generator = torch.Generator().manual_seed(9)
    keys = F.normalize(torch.randn(2, 16, 30, generator=generator), dim=1)
    targets = torch.rand(2, len(image), 30, generator=generator).softmax(-1)
    loss = torch.zeros(())
    for x, k, t in zip((image, text), keys, targets, strict=True):
        loss = loss - ((x @ k / temperature).log_softmax(-1) * t).sum(-1).mean()
    return loss


def itm_loss(logits: Tensor, pairs: int) -> Tensor:
    labels = torch.cat([torch.ones(pairs), torch.zeros(2 * pairs)]).long()
    return F.cross_entropy(logits, labels)


def plain_losses(med: MED, images: Tensor, sentences: list[list[int]]) -> list[Tensor]:
    plain, special = Plain(med), med.config.text.special
    longest, pairs = max(map(len, sentences)), len(sentences)
    ids = torch.tensor([s + [special.pad] * (longest - len(s)) for s in sentences])
    mask = ids != special.pad
    embeds = plain.encode_image(images)
    image = F.normalize(plain.linear("vision_proj", embeds[:, 0]), dim=-1)
    text = F.normalize(plain.linear("text_proj", plain.text(ids, mask, None)[:, 0]), dim=-1)
    itc = contrastive(image, text, plain.weights["temperature.value"])

    enc = ids.clone()
    enc[:, 0] = special.enc
    positive = plain.text(enc, mask, embeds)
    negative = plain.text(
        torch.cat([enc, enc[NEGATIVE_TEXTS]]),
        torch.cat([mask, mask[NEGATIVE_TEXTS]]),
        torch.cat([embeds[NEGATIVE_IMAGES], embeds]),
    )
    itm = plain.linear("itm_head", torch.cat([positive[:, 0], negative[:, 0]]))

    dec = ids.clone()
    dec[:, 0] = special.dec
    logits = plain.lm_logits(plain.text(dec, mask, embeds, decoder=True))
    targets = dec.masked_fill(~mask, -100)[:, 1:]
    lm = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), label_smoothing=SMOOTHING)
    return [itc, itm_loss(itm, pairs), lm]


def swept_losses(med: MED, images: Tensor, sentences: list[list[int]]) -> list[Tensor]:
    text, special = PackedText.from_lists(sentences), med.config.text.special
    embeds = med.encode_image(images)
    image = med.project_image(embeds)
    itc = contrastive(image, med.project_text(med.encode_text(text)), med.temperature())
    enc = text.with_first_token(special.enc)
    every = torch.arange(len(sentences))
    itm, logits, targets = med.sweep(
        enc.select(torch.cat([torch.arange(4), torch.arange(4), NEGATIVE_TEXTS])),
        text.with_first_token(special.dec),
        embeds,
        torch.cat([every, NEGATIVE_IMAGES, every]),
        every,
    )
    lm = F.cross_entropy(logits, targets, label_smoothing=SMOOTHING)
    return [itc, itm_loss(itm, len(sentences)), lm]


def gradients(med: MED, losses: list[Tensor]) -> dict[str, Tensor]:
    med.zero_grad()
    sum(losses).backward()
    return {name: parameter.grad for name, parameter in med.named_parameters()}


def test_one_sweep_equals_four_plain_passes(
    med: MED, images: Tensor, sentences: list[list[int]]
) -> None:
    expected, losses = plain_losses(med, images, sentences), swept_losses(med, images, sentences)
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)
    wanted, got = gradients(med, expected), gradients(med, losses)
    for name, gradient in wanted.items():
        assert gradient is not None and gradient.abs().max() > 0, f"{name} takes no part"
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-5, msg=name)


def test_gradient_checkpointing_changes_nothing(
    make_med, images: Tensor, sentences: list[list[int]]
) -> None:
    """Dropout is on, so the recomputation must draw the same masks."""
    seen = []
    for checkpointing in (False, True):
        med = make_med(gradient_checkpointing=checkpointing, dropout=0.1).train()
        torch.manual_seed(5)
        losses = swept_losses(med, images, sentences)
        seen.append((losses, gradients(med, losses)))
    torch.testing.assert_close(seen[0], seen[1], atol=0, rtol=0)


def test_single_modes_equal_the_sweep(med: MED, images: Tensor, sentences: list[list[int]]) -> None:
    text = PackedText.from_lists(sentences)
    enc, dec = text.with_first_token(3), text.with_first_token(4)
    embeds, index = med.encode_image(images), torch.tensor([1, 1, 3, 0])
    itm, lm, targets = med.sweep(enc, dec, embeds, index, index)
    torch.testing.assert_close(med.match(enc, embeds, index), itm, atol=1e-5, rtol=0)
    logits = med.decode(dec, embeds, index)
    ends = text.segments.offsets[1:].long() - 1
    kept = torch.ones(len(logits), dtype=torch.bool).index_fill(0, ends, False)
    torch.testing.assert_close(logits[kept], lm, atol=1e-5, rtol=0)
    assert targets.tolist() == [token for ids in sentences for token in ids[1:]]


def test_momentum_encoder_is_the_unimodal_half(
    med: MED, images: Tensor, sentences: list[list[int]]
) -> None:
    momentum = MomentumEncoder(med.config)
    names = []
    with torch.no_grad():
        for name, copy, online in momentum.pairs(med):
            names.append(name)
            copy.copy_(online)
    assert not any("cross" in name or "decoder" in name or "head" in name for name in names)
    assert not any(parameter.requires_grad for parameter in momentum.parameters())
    text = PackedText.from_lists(sentences)
    for module in (med, momentum):
        module.eval()
    torch.testing.assert_close(
        momentum.project_image(momentum.encode_image(images)),
        med.project_image(med.encode_image(images)),
    )
    torch.testing.assert_close(
        momentum.project_text(momentum.encode_text(text)), med.project_text(med.encode_text(text))
    )


def test_features_are_fp32_of_norm_one_in_bf16(
    med: MED, images: Tensor, sentences: list[list[int]]
) -> None:
    med.bfloat16()
    text = PackedText.from_lists(sentences)
    for features in (
        med.project_image(med.encode_image(images.bfloat16())),
        med.project_text(med.encode_text(text)),
    ):
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(features)))
    assert med.temperature().dtype == torch.float32


def test_lm_head_is_the_word_embedding(med: MED) -> None:
    assert med.lm_head.weight is med.text.embeddings.word.weight
    assert sum(p is med.lm_head.weight for p in med.parameters()) == 1


def test_temperature_is_a_copy_with_gradient() -> None:
    temperature = Temperature(0.07)
    value = temperature()
    assert value.shape == () and value.data_ptr() != temperature.value.data_ptr()
    (3 * value).backward()
    assert temperature.value.grad.item() == 3


def test_initial_weights_depend_on_the_seed_alone(med: MED) -> None:
    first, again, other = MED(med.config), MED(med.config), MED(med.config)
    torch.manual_seed(0)
    init_weights(first, seed=7)
    torch.manual_seed(1)
    init_weights(again, seed=7)
    init_weights(other, seed=8)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    assert not torch.equal(first.itm_head.weight, other.itm_head.weight)
    assert first.text.layers[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    init_weights(other, seed=7, text_std=0.1)
    for name, std in {"text.layers.0.mlp.fc1": 0.1, "text.embeddings.word": 0.02}.items():
        assert other.get_submodule(name).weight.std().item() == pytest.approx(std, rel=0.1)
    assert first.temperature().item() == pytest.approx(0.07)


def test_drop_path_reaches_the_vision_tower(med: MED) -> None:
    config = replace(med.config, vision=replace(med.config.vision, drop_path_rate=0.2))
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for b in MED(config).vision.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])

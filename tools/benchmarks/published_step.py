"""BLIP's pretraining step as the published code computes it, the baseline of the benchmarks.

Captions are padded to 30 tokens. There are four passes through the text layers: text alone, matched
pairs, mismatched pairs, and decoder. Queries, keys and values are projected separately. Keys and
values of the images are recomputed in each pass. Negatives are drawn row by row, the queue is
cloned, and momentum and AdamW update one parameter at a time. The layers are those of timm and of
transformers' BLIP. The step is not used for training.

Legend: B batch, N image tokens, D width, L padded length, E embed_dim, Q queue.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipVisionConfig,
)

from blip_scale.config.recipe import ObjectiveRecipe, OptimizerRecipe
from blip_scale.interop.huggingface_config import text_config
from blip_scale.interop.huggingface_names import to_huggingface
from blip_scale.interop.salesforce import to_salesforce
from blip_scale.model.heads import Head
from blip_scale.model.med import MED, MEDConfig
from blip_scale.model.packing import PackedText
from blip_scale.model.vision import build_vision


@dataclass(frozen=True)
class Negatives:
    """Batch indices of a negative image for each text, and of a negative text for each image."""

    image: list[int]
    text: list[int]


class PublishedStep:
    """Network, queue and optimizer of the published code, starting from the weights of a MED."""

    def __init__(
        self,
        med: MED,
        objective: ObjectiveRecipe,
        optimizer: OptimizerRecipe,
        queue: tuple[Tensor, Tensor],
        max_tokens: int = 30,
    ) -> None:
        """Build the network, queue and optimizer.

        Args:
            med: fp32 weights to start from.
            objective: settings of the losses.
            optimizer: settings of AdamW.
            queue: image and text features [E, Q] to start from; copied.
            max_tokens: number of tokens that captions are padded to.
        """
        config = med.config
        self.special, self.objective, self.max_tokens = config.text.special, objective, max_tokens
        self.vision = _plain_vision(config)
        self.vision.load_state_dict(med.vision.state_dict())
        sizes = _huggingface_config(config)
        retrieval = BlipForImageTextRetrieval(sizes)
        captioning = BlipForConditionalGeneration(sizes)
        _load_text(retrieval, med, "retrieval")
        _load_text(captioning, med, "captioning")
        self.text_encoder, self.text_decoder = retrieval.text_encoder, captioning.text_decoder
        self.vision_proj, self.text_proj = retrieval.vision_proj, retrieval.text_proj
        self.itm_head = retrieval.itm_head
        self.temperature = nn.Parameter(med.temperature.value.detach().clone())
        _tie(self.text_encoder, self.text_decoder)
        online = (self.vision, self.vision_proj, self.text_encoder, self.text_proj)
        self.pairs = [(module, copy.deepcopy(module).requires_grad_(False)) for module in online]
        self.image_queue, self.text_queue = (features.clone() for features in queue)
        self.pointer = 0
        self.modules = [*online, self.text_decoder, self.itm_head]
        unique = {id(p): p for module in self.modules for p in module.parameters()}
        self.parameters = [*unique.values(), self.temperature]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=optimizer.peak_lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )
        self.train()

    def train(self, mode: bool = True) -> None:
        """Switch dropout on or off, also in the momentum copies, as published."""
        for module in [*self.modules, *(copied for _, copied in self.pairs)]:
            module.train(mode)

    def take_attention(self, kind: str) -> None:
        """Set the ViT's attention to `eager` or `sdpa`. The text layers support only `eager`."""
        for vision in (self.vision, self.pairs[0][1]):
            for block in vision.blocks:
                block.attn.fused_attn = kind == "sdpa"

    def step(
        self,
        images: Tensor,
        captions: tuple[Tensor, Tensor],
        alpha: float,
        negatives: Negatives | None = None,
    ) -> dict[str, float]:
        """Run one optimizer step. Returns the losses, read one by one as in the published loop.

        Args:
            images: [B, 3, H, W] fp32.
            captions: from `padded`.
            alpha: weight of the soft targets.
            negatives: negatives to use; None draws them.
        """
        self.optimizer.zero_grad()
        losses = self.losses(images, *captions, alpha, negatives)
        (losses["itc"] + losses["itm"] + losses["lm"]).backward()
        self.optimizer.step()
        return {name: loss.item() for name, loss in losses.items()}

    def losses(
        self, images: Tensor, ids_BL: Tensor, mask_BL: Tensor, alpha: float, fixed: Negatives | None
    ) -> dict[str, Tensor]:
        """Compute the published forward, including its side effects."""
        with torch.no_grad():
            self.temperature.clamp_(0.001, 0.5)
        image_embeds = self.vision(images)
        image_mask = image_embeds.new_ones(image_embeds.shape[:2], dtype=torch.long)
        image_features = F.normalize(self.vision_proj(image_embeds[:, 0]).float(), dim=-1)
        hidden = self._encode(self.text_encoder, ids_BL, mask_BL)
        text_features = F.normalize(self.text_proj(hidden[:, 0]).float(), dim=-1)
        similarities, itc = self._contrast(
            (image_features, text_features), images, ids_BL, mask_BL, alpha
        )
        itm = self._match(image_embeds, image_mask, ids_BL, mask_BL, similarities, fixed)
        decoder_ids = ids_BL.clone()
        decoder_ids[:, 0] = self.special.dec
        targets = decoder_ids.masked_fill(decoder_ids == self.special.pad, -100)
        logits = self.text_decoder(
            decoder_ids,
            attention_mask=mask_BL,
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=image_mask,
            is_decoder=True,
            use_cache=False,
        ).logits
        lm = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            targets[:, 1:].flatten(),
            label_smoothing=self.objective.label_smoothing,
        )
        return {"itc": itc, "itm": itm, "lm": lm}

    def _contrast(
        self,
        online: tuple[Tensor, Tensor],
        images: Tensor,
        ids_BL: Tensor,
        mask_BL: Tensor,
        alpha: float,
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        with torch.no_grad():
            for module, momentum in self.pairs:
                for p, p_m in zip(module.parameters(), momentum.parameters(), strict=True):
                    kept = self.objective.momentum
                    p_m.data = p_m.data * kept + p.data * (1.0 - kept)
            vision, vision_proj, encoder, text_proj = (momentum for _, momentum in self.pairs)
            image_keys = F.normalize(vision_proj(vision(images)[:, 0]).float(), dim=-1)
            hidden = self._encode(encoder, ids_BL, mask_BL)
            text_keys = F.normalize(text_proj(hidden[:, 0]).float(), dim=-1)
            all_images = torch.cat([image_keys.T, self.image_queue.clone().detach()], dim=1)
            all_texts = torch.cat([text_keys.T, self.text_queue.clone().detach()], dim=1)
            targets = []
            for keys, pool in ((image_keys, all_texts), (text_keys, all_images)):
                soft = F.softmax(keys @ pool / self.temperature, dim=1)
                hard = torch.zeros_like(soft).fill_diagonal_(1)
                targets.append(alpha * soft + (1 - alpha) * hard)
        image_to_text = online[0] @ all_texts / self.temperature
        text_to_image = online[1] @ all_images / self.temperature
        i2t = -torch.sum(F.log_softmax(image_to_text, dim=1) * targets[0], dim=1).mean()
        t2i = -torch.sum(F.log_softmax(text_to_image, dim=1) * targets[1], dim=1).mean()
        columns = slice(self.pointer, self.pointer + len(images))
        self.image_queue[:, columns], self.text_queue[:, columns] = image_keys.T, text_keys.T
        self.pointer = (self.pointer + len(images)) % self.image_queue.shape[1]
        return (image_to_text, text_to_image), (i2t + t2i) / 2

    def _match(
        self,
        image_embeds: Tensor,
        image_mask: Tensor,
        ids_BL: Tensor,
        mask_BL: Tensor,
        similarities: tuple[Tensor, Tensor],
        fixed: Negatives | None,
    ) -> Tensor:
        batch = len(ids_BL)
        encoder_ids = ids_BL.clone()
        encoder_ids[:, 0] = self.special.enc
        positive = self._encode(
            self.text_encoder, encoder_ids, mask_BL, (image_embeds, image_mask)
        )[:, 0]
        drawn = fixed or self._draw(*similarities)
        negative_images = torch.stack([image_embeds[row] for row in drawn.image])
        negative_ids = torch.stack([encoder_ids[row] for row in drawn.text])
        negative_mask = torch.stack([mask_BL[row] for row in drawn.text])
        negative = self._encode(
            self.text_encoder,
            torch.cat([encoder_ids, negative_ids]),
            torch.cat([mask_BL, negative_mask]),
            (torch.cat([negative_images, image_embeds]), torch.cat([image_mask, image_mask])),
        )[:, 0]
        labels = torch.cat([torch.ones(batch), torch.zeros(2 * batch)]).long()
        logits = self.itm_head(torch.cat([positive, negative]))
        return F.cross_entropy(logits.float(), labels.to(logits.device))

    @torch.no_grad()
    def _draw(self, image_to_text: Tensor, text_to_image: Tensor) -> Negatives:
        batch = len(image_to_text)
        rows = []
        for scores in (text_to_image, image_to_text):
            weights = F.softmax(scores[:, :batch], dim=1) + 1e-4
            weights.fill_diagonal_(0)
            rows.append([int(torch.multinomial(weights[b], 1).item()) for b in range(batch)])
        return Negatives(*rows)

    def _encode(
        self,
        encoder: nn.Module,
        ids_BL: Tensor,
        mask_BL: Tensor,
        images: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        embeds, mask = images or (None, None)
        return encoder(
            ids_BL,
            attention_mask=mask_BL,
            encoder_hidden_states=embeds,
            encoder_attention_mask=mask,
        ).last_hidden_state

    def padded(self, text: PackedText) -> tuple[Tensor, Tensor]:
        """Token ids [B, L] and mask of B captions that begin with [CLS], without fillers."""
        ends = text.segments.offsets.tolist()[: text.count + 1]
        ids_BL = text.token_ids.new_full((len(ends) - 1, self.max_tokens), self.special.pad)
        for row, (start, end) in enumerate(itertools.pairwise(ends)):
            ids_BL[row, : end - start] = text.token_ids[start:end]
        return ids_BL, (ids_BL != self.special.pad).long()


def _plain_vision(config: MEDConfig) -> VisionTransformer:
    """Build timm's ViT of the same shape, with timm's attention."""
    ours = build_vision(config.vision)
    vision = timm.create_model(
        config.vision.name,
        img_size=config.vision.image_size,
        num_classes=0,
        global_pool="",
        drop_path_rate=config.vision.drop_path_rate,
        **config.vision.overrides,
    )
    modules = dict(vision.named_modules())
    for name, module in ours.named_modules():
        if isinstance(module, nn.LayerNorm):
            modules[name].eps = module.eps
    return vision


def _huggingface_config(config: MEDConfig) -> BlipConfig:
    """transformers' configuration of the text layers. Its ViT is unused and tiny."""
    width = build_vision(config.vision).embed_dim
    text = text_config(config.text, width)
    text.hidden_dropout_prob = text.attention_probs_dropout_prob = config.text.dropout
    text.use_cache = False
    vision = BlipVisionConfig(
        hidden_size=width, intermediate_size=1, num_hidden_layers=0, image_size=8, patch_size=8
    )
    return BlipConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        image_text_hidden_size=config.embed_dim,
    )


def _load_text(model: nn.Module, med: MED, head: Head) -> None:
    """Load the weights of the text layers. The ViT is timm's and loaded elsewhere."""
    state = to_huggingface(to_salesforce(med.state_dict(), head))
    texts = {name: value for name, value in state.items() if not name.startswith("vision_model.")}
    keys = model.load_state_dict(texts, strict=False)
    missing = [name for name in keys.missing_keys if not name.startswith("vision_model.")]
    if missing or keys.unexpected_keys:
        raise RuntimeError(f"published step: missing {missing}, unknown {keys.unexpected_keys}")


def _tie(encoder: Any, decoder: Any) -> None:
    """Share all weights of encoder and decoder except self-attention."""
    decoder.bert.embeddings = encoder.embeddings
    decoder.cls.predictions.decoder.weight = encoder.embeddings.word_embeddings.weight
    layers = zip(encoder.encoder.layer, decoder.bert.encoder.layer, strict=True)
    for encoder_layer, decoder_layer in layers:
        for part in ("crossattention", "intermediate", "output"):
            setattr(decoder_layer, part, getattr(encoder_layer, part))

"""The ring buffers of momentum features that ITC contrasts against.

Legend: E embed_dim, Q queue, G features that enter at once (all ranks, rank order).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from blip_scale.objectives.contrastive import FeaturePair

_NEVER = -1
_NO_IMAGE = -100  # as published


class FeatureQueue:
    """Momentum features of past steps, one buffer a modality; column j of both belongs to one pair.

    A plain object and no nn.Module: a module's buffers would follow its casts to bf16, and
    DeepSpeed's broadcast at the start leaves buffers out. The seed alone makes the random first
    content the same on all ranks, and the same gathered features on all ranks keep it so. Nothing
    here waits for the device.
    """

    def __init__(
        self,
        embed_dim: int,
        size: int,
        seed: int,
        device: torch.device | str = "cpu",
        with_image_ids: bool = False,
    ) -> None:
        """Fill both buffers with random unit columns.

        Args:
            embed_dim: E.
            size: Q, pairs kept.
            seed: the same on all ranks.
            device: where the buffers live.
            with_image_ids: keep which image each pair is of.
        """
        generator = torch.Generator().manual_seed(seed)
        self._image_EQ, self._text_EQ = (
            F.normalize(torch.randn(embed_dim, size, generator=generator), dim=0).to(device)
            for _ in range(2)
        )
        self.image_ids: torch.Tensor | None = None
        """[Q] int64, which image each column is of; -100 where nothing entered yet."""
        if with_image_ids:
            self.image_ids = torch.full((size,), _NO_IMAGE, dtype=torch.int64, device=device)
        # On the host: only ages are taken from it.
        self._entered_at_Q = torch.full((size,), _NEVER, dtype=torch.int64)
        self.pointer = 0
        """Column that the next feature takes."""
        self.enqueued = 0
        """Pairs that ever entered."""

    @property
    def size(self) -> int:
        """Q, the pairs that it holds."""
        return self._image_EQ.shape[1]

    @property
    def features(self) -> FeaturePair:
        """Both buffers, fp32 [E, Q], features in columns. `enqueue` overwrites them in place."""
        return FeaturePair(image=self._image_EQ, text=self._text_EQ)

    @torch.no_grad()
    def enqueue(
        self, features: FeaturePair, step: int, image_ids: torch.Tensor | None = None
    ) -> None:
        """Overwrite the oldest columns; the ring wraps, so any G up to Q will do.

        In place: the backward passes that used `features` of this queue must be done before.

        Args:
            features: momentum features of all ranks [G, E], the same tensors on every rank.
            step: optimizer step, for `age`.
            image_ids: [G] int64, for a queue that keeps them.

        Raises:
            ValueError: G is larger than Q, or the shapes do not fit.
        """
        incoming = len(features.image)
        expected = (incoming, len(self._image_EQ))
        if features.image.shape != expected or features.text.shape != expected:
            raise ValueError(
                f"feature queue: image features {tuple(features.image.shape)} and text features "
                f"{tuple(features.text.shape)} must both be {expected}"
            )
        if incoming > self.size:
            raise ValueError(
                f"feature queue: a global batch of {incoming} does not fit into a queue of "
                f"{self.size}; set objective.queue_size to {incoming} or more, or "
                "train.global_batch_size lower"
            )
        before_wrap = min(incoming, self.size - self.pointer)
        for rows, start in ((slice(0, before_wrap), self.pointer), (slice(before_wrap, None), 0)):
            columns = slice(start, start + len(features.image[rows]))
            self._image_EQ[:, columns] = features.image[rows].T
            self._text_EQ[:, columns] = features.text[rows].T
            self._entered_at_Q[columns] = step
            if self.image_ids is not None and image_ids is not None:
                self.image_ids[columns] = image_ids[rows]
        self.pointer = (self.pointer + incoming) % self.size
        self.enqueued += incoming

    def age(self, step: int) -> float:
        """Mean age in optimizer steps of the columns written so far; 0 while there is none."""
        entered = self._entered_at_Q[self._entered_at_Q != _NEVER]
        return step - entered.double().mean().item() if len(entered) else 0.0

    def state_dict(self) -> dict[str, Any]:
        """All state; the tensors are the live ones: save or copy them before the next `enqueue`."""
        state = {
            "image": self._image_EQ,
            "text": self._text_EQ,
            "entered_at": self._entered_at_Q,
            "pointer": self.pointer,
            "enqueued": self.enqueued,
        }
        return state if self.image_ids is None else state | {"image_ids": self.image_ids}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state that `state_dict` gave, on whatever device.

        Raises:
            ValueError: the state is of a queue of another size or embed_dim.
        """
        saved, here = tuple(state["image"].shape), tuple(self._image_EQ.shape)
        if saved != here:
            raise ValueError(
                f"feature queue: the checkpoint holds [embed_dim, size] = {list(saved)}, the "
                f"recipe asks for {list(here)}; set model.embed_dim and objective.queue_size as "
                "they were"
            )
        self._image_EQ.copy_(state["image"])
        self._text_EQ.copy_(state["text"])
        self._entered_at_Q.copy_(state["entered_at"])
        if self.image_ids is not None:
            self.image_ids.copy_(state["image_ids"])
        self.pointer = int(state["pointer"])
        self.enqueued = int(state["enqueued"])

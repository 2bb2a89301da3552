"""Ring buffers of the momentum features that serve as negatives in ITC.

Legend: E embed_dim, Q queue, G features added in one step (all ranks, in rank order).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from blip_scale.objectives.contrastive import FeaturePair

_NEVER = -1
_NO_IMAGE = -100  # as published


class FeatureQueue:
    """Momentum features of past steps: one buffer for images, one for texts, paired by column.

    The class is not an nn.Module, because a module's buffers would be cast to bf16 and DeepSpeed's
    initial broadcast omits buffers. All ranks still hold equal queues: the random initial content
    depends only on the seed, and every rank enqueues the same gathered features. No method waits
    for the device.
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
            embed_dim: width of a feature E.
            size: number of pairs Q.
            seed: must be equal on all ranks.
            device: device of the buffers.
            with_image_ids: whether to keep the image id of each pair.
        """
        generator = torch.Generator().manual_seed(seed)
        self._image_EQ, self._text_EQ = (
            F.normalize(torch.randn(embed_dim, size, generator=generator), dim=0).to(device)
            for _ in range(2)
        )
        self.image_ids: torch.Tensor | None = None
        """Image id of each column, [Q] int64; -100 in columns that are not yet written."""
        if with_image_ids:
            self.image_ids = torch.full((size,), _NO_IMAGE, dtype=torch.int64, device=device)
        # On the host, because only `age` reads it.
        self._entered_at_Q = torch.full((size,), _NEVER, dtype=torch.int64)
        self.pointer = 0
        """Column that the next feature overwrites."""
        self.enqueued = 0
        """Total number of pairs enqueued so far."""

    @property
    def size(self) -> int:
        """Number of pairs Q."""
        return self._image_EQ.shape[1]

    @property
    def features(self) -> FeaturePair:
        """Both buffers, fp32 [E, Q], one feature per column. `enqueue` overwrites them in place."""
        return FeaturePair(image=self._image_EQ, text=self._text_EQ)

    @torch.no_grad()
    def enqueue(
        self, features: FeaturePair, step: int, image_ids: torch.Tensor | None = None
    ) -> None:
        """Overwrite the oldest columns. The ring wraps, so any G up to Q is allowed.

        The buffers change in place. Backward passes that need `features` must be finished.

        Args:
            features: momentum features of all ranks [G, E], equal on every rank.
            step: optimizer step, for `age`.
            image_ids: [G] int64, for a queue with image ids.

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
        """Return the mean age, in optimizer steps, of the columns written so far; 0 if none."""
        entered = self._entered_at_Q[self._entered_at_Q != _NEVER]
        return step - entered.double().mean().item() if len(entered) else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the state. Tensors are not copied: save or clone them before `enqueue`."""
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
        """Restore the state of `state_dict`, which may be on any device.

        Raises:
            ValueError: size or embed_dim of the state differ from those of this queue.
        """
        saved, here = tuple(state["image"].shape), tuple(self._image_EQ.shape)
        if saved != here:
            raise ValueError(
                f"feature queue: the checkpoint holds [embed_dim, size] = {list(saved)}, the "
                f"recipe asks for {list(here)}; set model.embed_dim and objective.queue_size to "
                "the checkpoint's"
            )
        self._image_EQ.copy_(state["image"])
        self._text_EQ.copy_(state["text"])
        self._entered_at_Q.copy_(state["entered_at"])
        if self.image_ids is not None:
            self.image_ids.copy_(state["image_ids"])
        self.pointer = int(state["pointer"])
        self.enqueued = int(state["enqueued"])

"""Adapter that lets the package clip_benchmark 1.6 evaluate a BLIP.

clip_benchmark's load functions take (model_name, pretrained, cache_dir, device). They return a
model with encode_image and encode_text, a transform of PIL images, and a tokenizer.

Monkey patch: `register` replaces `accuracy` of clip_benchmark 1.6.2. The original calls float() on
a one-dimensional array, which NumPy 2.4 refuses. tests/inference/test_classification.py guards it.

Shapes: I images, S texts, L tokens of the longest text, E embed_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from blip_scale.data.captions import clean_caption
from blip_scale.data.pixels.transforms import EvalTransform
from blip_scale.inference.blip import Blip
from blip_scale.inference.loading import Loading, load_blip
from blip_scale.model.packing import PackedText

MODEL_TYPE = "blip_scale"
"""Name of the load function in clip_benchmark, given by its option --model_type."""
Transform = Callable[[Image.Image], Tensor]
Tokenize = Callable[[str | Sequence[str]], Tensor]


class ClipAdapter(nn.Module):
    """The contrastive encoders of a BLIP. `encode_image` normalises the images."""

    def __init__(self, blip: Blip) -> None:
        super().__init__()
        blip.require("embed")
        self.blip = blip
        self.network = blip.network  # registered, so that `parameters` and `eval` include it

    def encode_image(self, images: Tensor) -> Tensor:
        """Map the transform's uint8 [I, 3, H, W] to L2-normalised features, fp32 [I, E]."""
        features = self.blip.image_features(self.blip.image_embeds(images))
        return features.to(images.device)

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """Map the tokenizer's padded token ids [S, L] to L2-normalised features, fp32 [S, E]."""
        pad = self.network.config.text.special.pad
        rows = [row[row != pad].tolist() for row in token_ids]
        return self.blip.features_of(PackedText.from_lists(rows, self.blip.device)).to(
            token_ids.device
        )


def load_for_clip_benchmark(
    model_name: str = "",
    pretrained: str = "",
    cache_dir: str | None = None,
    device: str | torch.device = "cpu",
) -> tuple[ClipAdapter, Transform, Tokenize]:
    """Load a checkpoint for clip_benchmark.

    Args:
        model_name: any name, which clip_benchmark writes to its results.
        pretrained: path of a checkpoint with contrastive features, in any format.
        cache_dir: not used.
        device: device of the network.

    Returns:
        Model, transform and tokenizer.

    Raises:
        FileNotFoundError, ValueError: see `load_blip`.
    """
    blip = load_blip(Path(pretrained), Loading(device=str(device)))

    def tokenize(texts: str | Sequence[str]) -> Tensor:
        texts = [texts] if isinstance(texts, str) else texts
        ids = blip.tokenized([clean_caption(text) for text in texts])["input_ids"]
        pad = blip.network.config.text.special.pad
        return pad_sequence([torch.tensor(row) for row in ids], batch_first=True, padding_value=pad)

    return ClipAdapter(blip), _Transform(blip.image_size), tokenize


class _Transform:
    """The published resizing of PIL images. It can be pickled for DataLoader workers."""

    def __init__(self, size: int) -> None:
        self.resize = EvalTransform(size)

    def __call__(self, image: Image.Image) -> Tensor:
        return self.resize(image.convert("RGB"))


def register() -> None:
    """Add `MODEL_TYPE` to the model types of clip_benchmark, and replace its `accuracy`.

    Raises:
        ImportError: clip_benchmark or one of its dependencies is not installed.
    """
    from clip_benchmark import models
    from clip_benchmark.metrics import linear_probe, zeroshot_classification

    if MODEL_TYPE not in models.TYPE2FUNC:
        models.TYPE2FUNC[MODEL_TYPE] = load_for_clip_benchmark
        models.MODEL_TYPES.append(MODEL_TYPE)
    for module in (zeroshot_classification, linear_probe):
        module.accuracy = _accuracy


def _accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[float]:
    """Compute the share of rows of `output` [I, C] with `target` [I] in the first k, for each k."""
    ranked = output.topk(max(topk), dim=1).indices
    hits = ranked == target[:, None]
    return [hits[:, :k].any(dim=1).float().mean().item() for k in topk]

"""ONNX export of the image encoder and the text encoder, each with its projection.

Both map a batch to L2-normalised features, whose products are the contrastive similarities. Batch
size and text length are dynamic. The packages onnx and onnxscript write the files. onnxruntime runs
them, and the results are compared with the network's.

Shapes: I images, S texts, L tokens of the longest text, E embed_dim.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from blip_scale.data.pixels.transforms import normalize_images
from blip_scale.inference.blip import Blip
from blip_scale.model.attention import AttentionLayout, Segments
from blip_scale.model.med import MED
from blip_scale.model.packing import PackedText, TextPass

IMAGE_ENCODER = "image_encoder.onnx"
TEXT_ENCODER = "text_encoder.onnx"
TOLERANCE = 1e-4
"""Maximum difference between a feature from ONNX Runtime and from the network."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_MAX_SINGLE_FILE = 1_900_000_000
"""Bytes of weights above which they are stored in a second file. Protobuf is limited to 2 GiB."""
_BATCHES = (1, 3)
"""Batch sizes of the comparison."""
_CARD = """# BLIP encoders as ONNX

| file | input | output |
|---|---|---|
| `image_encoder.onnx` | `pixels`, uint8 [batch, 3, SIZE, SIZE], RGB | `image_features`, float32 \
[batch, WIDTH], of norm 1 |
| `text_encoder.onnx` | `input_ids` and `attention_mask`, int64 [batch, length], length at most \
TOKENS | `text_features`, float32 [batch, WIDTH], of norm 1 |

Pixels are normalised inside. `tokenizer.json` cuts and pads texts. Products of features are
cosines; divided by the temperature TEMPERATURE they are the logits of training.

```python
import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

image_encoder = onnxruntime.InferenceSession("image_encoder.onnx")
text_encoder = onnxruntime.InferenceSession("text_encoder.onnx")
tokenizer = Tokenizer.from_file("tokenizer.json")

image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
pixels = np.asarray(image).transpose(2, 0, 1)[None]
(image_features,) = image_encoder.run(None, {"pixels": pixels})

rows = tokenizer.encode_batch(["a dog on a beach", "two cats"])
(text_features,) = text_encoder.run(
    None,
    {
        "input_ids": np.array([row.ids for row in rows]),
        "attention_mask": np.array([row.attention_mask for row in rows]),
    },
)
cosines = image_features @ text_features.T
print(cosines)
```

Training captions are lower-case, without the characters . ! " ( ) * # : ; ~
"""


class ExportError(RuntimeError):
    """The network cannot be exported, or the export's results differ from the network's."""


class _ImageEncoder(nn.Module):
    def __init__(self, med: MED) -> None:
        super().__init__()
        self.med = med

    def forward(self, pixels: Tensor) -> Tensor:
        """Map uint8 [I, 3, H, W] to [I, E]."""
        images = normalize_images(pixels, torch.float32)
        return self.med.project_image(self.med.encode_image(images))


class _TextEncoder(nn.Module):
    """The text encoder for padded texts. It uses the same layers as for packed ones."""

    def __init__(self, med: MED) -> None:
        super().__init__()
        self.med = med

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map token ids and mask, both int64 [S, L], to [S, E]."""
        count, length = input_ids.shape
        offsets = torch.arange(count + 1, dtype=torch.int32) * length
        segments = Segments(offsets, length)
        mask = attention_mask.bool()[:, None, None, :]
        plan = TextPass(
            token_ids=input_ids.flatten(),
            positions=torch.arange(length).expand(count, length).flatten(),
            encoder_tokens=count * length,
            encoder=AttentionLayout(segments, segments, key_mask=mask),
            decoder=None,
            cross=None,
            read_rows=torch.arange(count) * length,
            read_cross=None,
        )
        return self.med.project_text(self.med.text(plan))


def require_packages() -> None:
    """Raise ValueError if a package that the export needs is not installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--to onnx needs {', '.join(missing)}, which are not installed: run `pip install "
            f"{' '.join(missing)}`, or install blip-scale with the extra onnx"
        )


def write_onnx(blip: Blip, folder: Path) -> float:
    """Write both encoders, the tokenizer and a README.md into an existing folder.

    Args:
        blip: checkpoint with contrastive features, in fp32 on the CPU.
        folder: existing folder for the files.

    Returns:
        Maximum difference between the features from ONNX Runtime and from the network.

    Raises:
        ValueError: the checkpoint has no contrastive features, or a package is missing.
        ExportError: the network cannot be exported, or the difference is above `TOLERANCE`.
    """
    require_packages()
    blip.require("embed")
    size = blip.image_size
    pixels = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    _export(_ImageEncoder(blip.med), {"pixels": pixels}, "image_features", folder / IMAGE_ENCODER)
    ids = torch.full((2, 3), blip.med.config.text.special.cls)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    _export(_TextEncoder(blip.med), inputs, "text_features", folder / TEXT_ENCODER)
    _serving_tokenizer(blip).save(str(folder / "tokenizer.json"))
    (folder / "README.md").write_text(_card(blip), encoding="utf-8")
    difference = largest_difference(blip, folder)
    if not difference <= TOLERANCE:
        raise ExportError(
            f"{blip.origin}: features of the exported encoders differ by {difference:.1e} from "
            f"those of the checkpoint, more than {TOLERANCE:.0e}; nothing was written"
        )
    return difference


def largest_difference(blip: Blip, folder: Path) -> float:
    """Return the maximum absolute difference on random pixels, and random texts of all lengths."""
    import onnxruntime

    generator = torch.Generator().manual_seed(0)
    images = onnxruntime.InferenceSession(folder / IMAGE_ENCODER)
    texts = onnxruntime.InferenceSession(folder / TEXT_ENCODER)
    text = blip.med.config.text
    differences = []
    for batch in _BATCHES:
        shape = (batch, 3, blip.image_size, blip.image_size)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        expected = blip.image_features(blip.image_embeds(pixels))
        (features,) = images.run(None, {"pixels": pixels.numpy()})
        differences.append((torch.from_numpy(features) - expected).abs().max())

        lengths = torch.linspace(1, blip.text_tokens, batch).int().tolist()
        ids = torch.randint(text.vocab_size, (batch, max(lengths)), generator=generator)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        rows = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
        expected = blip.features_of(PackedText.from_lists(rows))
        inputs = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        (features,) = texts.run(None, inputs)
        differences.append((torch.from_numpy(features) - expected).abs().max())
    return torch.stack(differences).max().item()


def _export(encoder: nn.Module, inputs: dict[str, Tensor], output: str, file: Path) -> None:
    """Write an encoder with a dynamic batch size, and a dynamic length if its inputs are texts."""
    dynamic: dict[str, dict[int, Any]] = {}
    for name, tensor in inputs.items():
        axes = {0: "batch"} if tensor.ndim > 2 else {0: "batch", 1: "length"}
        dynamic[name] = {axis: torch.export.Dim(label) for axis, label in axes.items()}
    weights = sum(parameter.nbytes for parameter in encoder.parameters())
    encoder.eval()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter warns about its own code
            # Without `strict`, tensors of the trace would enter the caches of `_statistics` and
            # `dense_segments`.
            program = torch.export.export(
                encoder, (), kwargs=inputs, dynamic_shapes=dynamic, strict=True
            )
            torch.onnx.export(
                program,
                f=str(file),
                input_names=list(inputs),
                output_names=[output],
                external_data=weights > _MAX_SINGLE_FILE,
                dynamo=True,
                verbose=False,
            )
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"the encoder of {output} cannot be exported: {reason}") from error


def _serving_tokenizer(blip: Blip) -> Tokenizer:
    """Copy the tokenizer, and make the copy truncate and pad texts itself."""
    tokenizer = Tokenizer.from_str(blip.tokenizer.backend_tokenizer.to_str())
    tokenizer.enable_truncation(blip.text_tokens)
    pad = blip.med.config.text.special.pad
    tokenizer.enable_padding(pad_id=pad, pad_token=blip.tokenizer.pad_token)
    return tokenizer


def _card(blip: Blip) -> str:
    values = {
        "SIZE": blip.image_size,
        "WIDTH": blip.med.config.embed_dim,
        "TOKENS": blip.med.config.text.max_positions,
        "TEMPERATURE": f"{blip.med.temperature().item():.6g}",
    }
    card = _CARD
    for name, value in values.items():
        card = card.replace(name, str(value))
    return card

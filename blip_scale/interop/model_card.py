"""README.md of an exported Hugging Face folder: example code, the network and its training."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from blip_scale.interop.blip_weights import BlipWeights
from blip_scale.interop.huggingface_config import CLASSES
from blip_scale.model.heads import Head

_PIPELINES: dict[Head, str] = {"captioning": "image-to-text", "vqa": "visual-question-answering"}
_USE: dict[Head, str] = {
    "captioning": """from PIL import Image
from transformers import BlipForConditionalGeneration, BlipProcessor

processor = BlipProcessor.from_pretrained("FOLDER", backend="pil")
model = BlipForConditionalGeneration.from_pretrained("FOLDER")
model.text_decoder.generation_config = model.generation_config  # transformers 5 doesn't do it
inputs = processor(Image.open("photo.jpg"), PROMPTreturn_tensors="pt")
written = model.generate(**inputs, max_length=model.generation_config.max_length)
print(processor.decode(written[0], skip_special_tokens=True))""",
    "retrieval": """from PIL import Image
from transformers import BlipForImageTextRetrieval, BlipProcessor

processor = BlipProcessor.from_pretrained("FOLDER", backend="pil")
model = BlipForImageTextRetrieval.from_pretrained("FOLDER")
inputs = processor(Image.open("photo.jpg"), "a dog on a beach", return_tensors="pt")
print(model(**inputs, use_itm_head=False).itm_score)  # cosine
inputs["input_ids"][:, 0] = model.config.text_config.enc_token_id  # as in training
print(model(**inputs).itm_score.softmax(-1)[:, 1])  # probability of a match""",
    "vqa": """from PIL import Image
from transformers import BlipForQuestionAnswering, BlipProcessor

processor = BlipProcessor.from_pretrained("FOLDER", backend="pil")
model = BlipForQuestionAnswering.from_pretrained("FOLDER")
model.text_decoder.generation_config = model.generation_config  # transformers 5 doesn't do it
inputs = processor(Image.open("photo.jpg"), "what is on the beach?", return_tensors="pt")
inputs["input_ids"][:, 0] = model.config.text_config.enc_token_id  # as in training
written = model.generate(**inputs)
print(processor.decode(written[0], skip_special_tokens=True))""",
}
"""Head -> example code for transformers 4.57 and 5.

In version 5, `backend="pil"` resizes as in training. Without it, pixels differ by up to one grey
level. In version 5, the decoder does not read lengths and beams from generation_config.json.
Version 4.57 treats a max_length of 20 as its own default and adds the prompt's length to it, unless
the call passes max_length.
"""


@dataclass(frozen=True)
class Origin:
    """Recipe and results of the run that made a checkpoint; empty for other checkpoints."""

    recipe: dict[str, Any] = field(default_factory=dict)
    """The resolved recipe."""
    summary: dict[str, Any] = field(default_factory=dict)
    """Content of summary.json, written at the end of the run."""


def model_card(weights: BlipWeights, origin: Origin) -> str:
    """Write the model card in Markdown. Unknown facts are omitted."""
    head, config = weights.head, weights.config
    tags = [f"pipeline_tag: {_PIPELINES[head]}"] if head in _PIPELINES else []
    prompt = weights.output_settings.prompt.strip()
    use = _USE[head].replace("PROMPT", f"{json.dumps(prompt)}, " if prompt else "")
    front = ["---", "library_name: transformers", "tags: [blip]", *tags, "---"]
    text, vision = config.text, config.vision
    untrained = (
        "\nIts encoder and decoder are those of pretraining: it was not fine-tuned on questions, "
        "so its answers mean nothing before that.\n"
        if head == "vqa" and origin.recipe.get("task") == "pretrain" else ""
    )  # fmt: skip
    network = (
        f"| ViT | {vision.name}{f', {vision.overrides}' if vision.overrides else ''}, "
        f"{vision.image_size} pixels |\n"
        f"| text | {text.layers} layers, width {text.width}, {text.heads} heads, "
        f"vocabulary {text.vocab_size} |\n"
        f"| special tokens | [DEC] {text.special.dec} opens a caption, [ENC] {text.special.enc} "
        "an image-grounded text |"
    )
    return f"""{chr(10).join(front)}

# BLIP for {head}

`{CLASSES[head]}` ([Li et al., 2022](https://arxiv.org/abs/2201.12086)), converted from a checkpoint
of blip_scale or of BLIP's published code.
{untrained}
```python
{use}
```

## Network

| | |
|---|---|
{network}

## Training

{_training(weights, origin)}
{_figures(weights, origin)}"""


def _training(weights: BlipWeights, origin: Origin) -> str:
    if not origin.recipe:
        step = f" It was trained for {weights.step} steps." if weights.step else ""
        return f"The checkpoint says nothing of its data.{step}\n"
    recipe = origin.recipe
    streams = ", ".join(stream["name"] for stream in recipe["data"]["streams"])
    rows = {
        "data": streams,
        "steps": weights.step,
        "pairs a step": recipe["train"]["global_batch_size"],
        "precision": recipe["train"]["precision"],
        "peak learning rate": recipe["optimizer"]["peak_lr"],
        "seed": recipe["seed"],
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"| | |\n|---|---|\n{table}\n"


def _figures(weights: BlipWeights, origin: Origin) -> str:
    """Write the section with the run's final results, if this checkpoint is its last one."""
    evaluation = origin.summary.get("evaluation") or {}
    if not evaluation or origin.summary.get("steps") != weights.step:
        return ""
    rows = "\n".join(f"| {name} | {_figure(value)} |" for name, value in sorted(evaluation.items()))
    figures = f"\n## Held-out figures\n\n| | |\n|---|---|\n{rows}\n"
    warnings = ""
    for name, alarm in sorted((origin.summary.get("alarms") or {}).items()):
        points = f"for the last {alarm['points']} logged points"
        warnings += f"- {alarm['message']} (`alarm/{name}`, {points})\n"
    return figures + (f"\n## Warnings at the end of training\n\n{warnings}" if warnings else "")


def _figure(value: float | None) -> str:
    """Format a figure of the summary. There, null means that the figure was not finite."""
    return "not finite" if value is None else f"{value:.4g}"

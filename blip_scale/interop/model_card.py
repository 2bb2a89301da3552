"""README.md of an exported Hugging Face folder: code to use it, its network and its training."""

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
"""Head -> code that runs on transformers 4.57 and 5.

On 5, `backend="pil"` resizes as in training; without it, pixels differ by up to one grey level. On
5, the decoder does not read lengths and beams from generation_config.json. 4.57 mistakes a
max_length of 20 for its own default and adds the prompt to it, unless the call passes max_length.
"""


@dataclass(frozen=True)
class Origin:
    """Recipe and figures of the run behind a checkpoint; empty for checkpoints from elsewhere."""

    recipe: dict[str, Any] = field(default_factory=dict)
    """The resolved recipe."""
    summary: dict[str, Any] = field(default_factory=dict)
    """Content of summary.json, written at the end of the run."""


def model_card(weights: BlipWeights, origin: Origin) -> str:
    """Write the model card in Markdown, leaving out what is unknown."""
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
    """Section with the run's final figures, if this checkpoint is its last one."""
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
    """Format a figure of the summary, in which null stands for a figure that is not finite."""
    return "not finite" if value is None else f"{value:.4g}"

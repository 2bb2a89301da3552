"""Run what the model cards show, and write what transformers computes from exported folders.

python read_exports.py EXPORTS PICTURES REPORT: EXPORTS has captioning/, retrieval/, vqa/ and
words/ (a processor whose tokenizer has a special token [X] of its own), REPORT.json is written.
Runs in an environment without blip_scale.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipProcessor,
)

EXACT = {"use_fast": False} if transformers.__version__ < "5" else {"backend": "pil"}
"""Arguments that select Pillow's resize, as published, without a warning."""


def card_output(folder: Path, picture: Path) -> list[str]:
    """Lines that the code of a model card prints for a picture."""
    card = (folder / "README.md").read_text()
    code = re.search("```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code[1].replace("FOLDER", str(folder)).replace("photo.jpg", str(picture)), {})
    return printed.getvalue().splitlines()


@torch.no_grad()
def computed(exports: Path, pictures: list[Path], texts: list[str]) -> dict[str, Any]:
    """Cosines, matching logits, captions and answers."""
    images = [Image.open(picture) for picture in pictures]
    processor = BlipProcessor.from_pretrained(exports / "retrieval", **EXACT)
    inputs = processor(images, texts, padding=True, return_tensors="pt")
    matcher = BlipForImageTextRetrieval.from_pretrained(exports / "retrieval")
    cosines = matcher(**inputs, use_itm_head=False).itm_score
    inputs["input_ids"][:, 0] = matcher.config.text_config.enc_token_id
    captioner = BlipForConditionalGeneration.from_pretrained(exports / "captioning")
    lengths = {"max_length": 10, "min_length": 4, "num_beams": 3}
    written = captioner.generate(inputs["pixel_values"], **lengths)
    if transformers.__version__ >= "5":  # transformers 4 does not need this line
        captioner.text_decoder.generation_config = captioner.generation_config
    longest = captioner.generation_config.max_length
    as_configured = captioner.generate(inputs["pixel_values"], max_length=longest)
    words = BlipProcessor.from_pretrained(exports / "words", **EXACT).tokenizer
    answerer = BlipForQuestionAnswering.from_pretrained(exports / "vqa")
    answers = []
    for row in range(len(texts)):
        asked = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
        answer = answerer.generate(asked, inputs["pixel_values"][row : row + 1], **lengths)
        answers.append(answer[0].tolist())
    return {
        "cosines": cosines.tolist(),
        "logits": matcher(**inputs).itm_score.tolist(),
        "captions": written.tolist(),
        "as_configured": as_configured.tolist(),
        "answers": answers,
        "words": words("a [X] red")["input_ids"],
        "special": words.decode(words("a [X] red")["input_ids"], skip_special_tokens=True),
        "temperature": matcher.config.itc_temperature,
    }


def main() -> None:
    exports, folder, report = map(Path, sys.argv[1:])
    pictures = sorted(folder.glob("*.png"))
    texts = [file.with_suffix(".txt").read_text() for file in pictures]
    results = {"transformers": transformers.__version__, **computed(exports, pictures, texts)}
    sys.stderr.write("cards\n")
    heads = ("captioning", "retrieval", "vqa")
    results["cards"] = {head: card_output(exports / head, pictures[0]) for head in heads}
    report.write_text(json.dumps(results))


if __name__ == "__main__":
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    main()

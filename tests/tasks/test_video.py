"""Zero-shot video retrieval (frames, features and metrics) against plain loops."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
import tiny_runs
import torch
import torch.nn.functional as F

from blip_scale.config.recipe import Recipe
from blip_scale.data.heldout.videos import VideoSet, frame_indices
from blip_scale.data.tokenizer import load_tokenizer
from blip_scale.evaluation import captions_and_pairs
from blip_scale.evaluation.video import video_retrieval
from blip_scale.inference.inputs import to_pixels
from blip_scale.inference.sizes import med_config
from blip_scale.model.packing import PackedText
from blip_scale.tasks import networks

CLIPS = {"red": "disc", "green": "square", "blue": "bar"}


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Two folders of frames and a video file, in which a drawing grows small; and their list."""
    for colour, shape in CLIPS.items():
        drawn = [tiny_runs.picture(colour, shape, big) for big in (True, True, False, False)]
        if colour != "blue":
            (tmp_path / colour).mkdir()
            for number, encoded in enumerate(drawn):
                (tmp_path / colour / f"{number}.png").write_bytes(encoded)
    with av.open(str(tmp_path / "blue.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for number in range(10):
            pixels = np.full((64, 64, 3), 20 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    lines = [
        {"clip_name": colour, "caption": f"A {colour} {shape}."} for colour, shape in CLIPS.items()
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "list.jsonl"


def test_frames(clips: Path) -> None:
    assert frame_indices(100, 8) == [0, 12, 24, 36, 48, 60, 72, 84]
    assert frame_indices(3, 5) == [0, 1, 2, 2, 2]
    videos = VideoSet(clips, clips.parent, 32)
    assert videos.captions == [["a red disc"], ["a green square"], ["a blue bar"]]
    seen = videos.frames(0, 2)
    assert seen.shape == (2, 3, 32, 32) and not torch.equal(seen[0], seen[1])
    grey = videos.frames(2, 5).float().mean((1, 2, 3))
    assert torch.allclose(grey, torch.tensor([0.0, 40, 80, 120, 160]), atol=6)


def test_what_is_refused(clips: Path) -> None:
    (clips.parent / "blue.mp4").write_bytes(b"no video")
    videos = VideoSet(clips, clips.parent, 32)
    assert (videos.frames(2, 2) == 128).all() and list(videos.unreadable) == ["blue"]
    (clips.parent / "blue.mp4").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 videos are missing in"):
        VideoSet(clips, clips.parent, 32)
    clips.write_text('{"clip_name": "red"}\n')
    with pytest.raises(ValueError, match=r"list\.jsonl:1: not {clip_name, caption}"):
        VideoSet(clips, clips.parent, 32)


@torch.no_grad()
def test_retrieval(clips: Path, recipe: Recipe) -> None:
    """Scores are cosines to the mean of the frames, plus matches with the tokens of all frames."""
    tokenizer = load_tokenizer(recipe.model.text)
    med = networks.initialized_med(recipe, med_config(recipe, tokenizer)).eval()
    videos = VideoSet(clips, clips.parent, 32)
    figures = video_retrieval(med, videos, 2, recipe, tokenizer)
    scores = torch.zeros(3, 3)
    captions = [texts_of_video[0] for texts_of_video in videos.captions]
    texts = captions_and_pairs.Texts(captions, recipe, tokenizer, med)
    for i in range(3):
        tokens = med.encode_image(to_pixels(videos.frames(i, 2), med))
        feature = F.normalize(med.vision_proj(tokens[:, 0]).mean(0), dim=0)
        for s in range(3):
            text: PackedText = texts.plain([s])
            cosine = feature @ med.project_text(med.encode_text(text))[0]
            zero = torch.zeros(1, dtype=torch.int64)
            row = torch.cat([*tokens])[None]
            logit = med.match(texts.matching([s]), row, zero)[0, 1]
            scores[i, s] = cosine + logit
    ranks = (scores >= scores.diagonal()).sum(0)
    assert figures["itm_text_to_video_r1"] == pytest.approx((ranks == 1).double().mean().item())
    assert figures["text_to_video_median_rank"] == ranks.median()
    assert figures["candidates"] == figures["texts"] == 3


def video_list(folder: Path, text: str) -> Path:
    """A list of videos beside a folder of frames, whose numbers have one or two digits."""
    (folder / "v").mkdir(exist_ok=True)
    for number in range(1, 12):
        image = tiny_runs.picture("red", "disc", number % 2 == 0)
        (folder / "v" / f"frame{number}.png").write_bytes(image)
    file = folder / "list.jsonl"
    file.write_text(text, encoding="utf-8")
    return file


def test_lists_as_people_write_them(tmp_path: Path) -> None:
    """The list has a byte order mark, empty lines, several captions, and a line separator inside
    one."""
    lines = (
        '\ufeff{"clip_name": "v", "caption": ["a man", "a cook"]}\r\n\n'
        '{"clip_name": "v", "caption": "a man\u2028walks"}\n'
    )
    videos = VideoSet(video_list(tmp_path, lines), tmp_path, 32)
    assert videos.captions == [["a man", "a cook", "a man walks"]]


@pytest.mark.parametrize("caption", ["null", "3", '""', '["a man", null]'])
def test_captions_that_are_no_text_are_refused(tmp_path: Path, caption: str) -> None:
    lines = f'{{"clip_name": "v", "caption": "a"}}\n{{"clip_name": "v", "caption": {caption}}}\n'
    with pytest.raises(ValueError, match=r"list\.jsonl:2: .* is not text"):
        VideoSet(video_list(tmp_path, lines), tmp_path, 32)


def test_frames_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    videos = VideoSet(video_list(tmp_path, '{"clip_name": "v", "caption": "a"}'), tmp_path, 32)
    seen = videos.frames(0, 11)
    alternating = [torch.equal(seen[0], frame) for frame in seen]
    assert alternating == [number % 2 == 0 for number in range(11)]

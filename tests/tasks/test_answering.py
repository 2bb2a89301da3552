"""Answers chosen from a list, and the loss of weighted answers, against plain loops."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from blip_scale.evaluation.answers import rank, read_answer_list, submission
from blip_scale.model.initialization import fill_from_med, init_weights
from blip_scale.model.med import MED, MEDConfig
from blip_scale.model.packing import PackedText
from blip_scale.model.text import SpecialTokens, TextConfig
from blip_scale.model.vision import VisionConfig
from blip_scale.model.vqa import VQA
from blip_scale.objectives.answers import sequence_losses
from blip_scale.tasks.vqa import VQANetwork, answer_weights

PAD, CLS, SEP, ENC, DEC = range(5)
QUESTIONS = [[ENC, 7, 8, 9, SEP], [ENC, 10, SEP]]
ANSWERS = [[DEC, 20, SEP], [DEC, 20, 21, SEP], [DEC, 22, 23, 24, SEP], [DEC, 25, SEP]]


@pytest.fixture(scope="module")
def vqa() -> VQA:
    """A VQA network whose weights give distinct answers."""
    text = TextConfig(SpecialTokens(PAD, CLS, SEP, ENC, DEC), 40, 24, 2, 2, 48, 16, dropout=0.0)
    sizes = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    config = MEDConfig(VisionConfig("vit_tiny_patch16_224", 16, sizes), text, 8)
    med = MED(config)
    init_weights(med, seed=1, vision_std=0.5)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in med.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    network = VQA(config)
    fill_from_med(network, dict(med.named_parameters()), seed=0)
    return network.eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def loss_of(vqa: VQA, images: torch.Tensor, question: int, answer: list[int]) -> float:
    """Loss of one answer to one question, token by token."""
    text = PackedText.from_lists([QUESTIONS[question]])
    zero = torch.zeros(1, dtype=torch.int64)
    embeds = vqa.encode_image(images[question : question + 1])
    states = vqa.encode_questions(text, embeds, zero)
    logits = vqa.decode(PackedText.from_lists([answer]), states, text.segments, zero)
    total = 0.0
    for place, token in enumerate(answer[1:]):
        logs = logits[place].log_softmax(-1)
        total -= float(0.9 * logs[token] + 0.1 * logs.mean())
    return total


@torch.no_grad()
@pytest.mark.parametrize("top_k", [2, 100])
def test_ranking(vqa: VQA, images: torch.Tensor, top_k: int) -> None:
    """The best candidate among those with the likeliest first tokens is chosen."""
    text = PackedText.from_lists(QUESTIONS)
    every = torch.arange(2)
    states = vqa.encode_questions(text, vqa.encode_image(images), every)
    candidates = PackedText.from_lists(ANSWERS)
    chosen = rank(vqa, states, text.segments, candidates, top_k, 0.1).tolist()
    start = PackedText.from_lists([[DEC]] * 2)
    first = vqa.decode(start, states, text.segments, every)[:, [ids[1] for ids in ANSWERS]]
    for question in range(2):
        allowed = first[question].topk(min(top_k, len(ANSWERS))).indices.tolist()
        best = min(allowed, key=lambda a: loss_of(vqa, images, question, ANSWERS[a]))
        assert chosen[question] == best


@torch.no_grad()
def test_loss(vqa: VQA, images: torch.Tensor) -> None:
    """The loss is summed over tokens, weighted, and divided by the number of questions."""
    plain = [
        (0, ANSWERS[0], 0.7),
        (0, ANSWERS[1], 0.3),
        (1, ANSWERS[2], 0.2),
    ]
    expected = sum(w * loss_of(vqa, images, q, a) for q, a, w in plain) / 2
    outputs = VQANetwork(vqa, 0.1)(
        images,
        PackedText.from_lists(QUESTIONS).with_first_token(CLS),
        PackedText.from_lists([a for _, a, _ in plain]).with_first_token(CLS),
        torch.tensor([q for q, _, _ in plain]),
        torch.tensor([w for _, _, w in plain]),
    )
    assert float(outputs["loss/total"]) == pytest.approx(expected, rel=1e-5)


def test_weights() -> None:
    answers = ["red"] * 7 + ["dark red"] * 3
    assert answer_weights({"answers": answers, "dataset": "vqa"}) == {"red": 0.7, "dark red": 0.3}
    assert answer_weights({"answers": ["red"], "dataset": "vg"}) == {"red": 0.2}


def test_losses_are_summed_by_sequence() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    targets, owners = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 0, 1, 1, 1])
    losses = sequence_losses(logits, targets, owners, 2, 0.1)
    parts = [logits[:2], logits[2:]], [targets[:2], targets[2:]]
    for number, (some, wanted) in enumerate(zip(*parts, strict=True)):
        total = F.cross_entropy(some, wanted, label_smoothing=0.1, reduction="sum")
        assert losses[number] == pytest.approx(float(total))


def test_answer_lists(tmp_path: Path) -> None:
    file = tmp_path / "answer_list.json"
    with pytest.raises(FileNotFoundError, match=r"answer_list\.json: no such file"):
        read_answer_list(file)
    for content, message in (("[1]", "no list of answers"), ("{", "is not JSON")):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_answer_list(file)
    file.write_text(json.dumps(["yes", "no"]))
    assert read_answer_list(file) == ["yes", "no"]


def test_submission() -> None:
    annotations = [[{"question_id": 5}, {"question_id": 6}], [{"question_id": 7}]]
    pairs = SimpleNamespace(name="test", ids=["a", "b"], annotations=annotations)
    rows = submission(pairs, [["red", "2"], ["no"]])  # type: ignore[arg-type]
    assert rows == [
        {"question_id": 5, "answer": "red"}, {"question_id": 6, "answer": "2"},
        {"question_id": 7, "answer": "no"},
    ]  # fmt: skip
    annotations[1][0] = {}
    with pytest.raises(ValueError, match="a question about b has no question_id"):
        submission(pairs, [["red", "2"], ["no"]])  # type: ignore[arg-type]

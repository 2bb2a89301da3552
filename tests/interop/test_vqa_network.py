"""Our VQA network against transformers' BlipForQuestionAnswering at random weights."""

from __future__ import annotations

import pytest
import tiny_blip
import torch
from torch import Tensor, nn

from blip_scale.interop.blip_weights import BlipWeights
from blip_scale.interop.heads import expected_shapes
from blip_scale.interop.huggingface_config import blip_config
from blip_scale.interop.huggingface_names import to_huggingface
from blip_scale.interop.task_names import task_from_published, task_to_published
from blip_scale.model.generation import BeamSettings, caption_beam
from blip_scale.model.med import MEDConfig
from blip_scale.model.packing import PackedText
from blip_scale.model.text import SpecialTokens, TextConfig
from blip_scale.model.vision import VisionConfig
from blip_scale.model.vqa import VQA

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
PAD, CLS, SEP, ENC, DEC = range(5)
QUESTIONS = [[ENC, 7, 8, 9, SEP], [ENC, 10, SEP], [ENC, 11, 12, 13, 14, 15, SEP]]
ANSWERS = [[DEC, 20, SEP], [DEC, 21, 22, 23, SEP], [DEC, 24, 25, SEP]]


@pytest.fixture(scope="module")
def sizes() -> MEDConfig:
    special = SpecialTokens(pad=PAD, cls=CLS, sep=SEP, enc=ENC, dec=DEC)
    text = TextConfig(special, 40, 48, 2, 4, 96, 32)
    return MEDConfig(VisionConfig("vit_tiny_patch16_224", 32, dict(tiny_blip.SIZES)), text, 16)


@pytest.fixture(scope="module")
def vqa(sizes: MEDConfig) -> VQA:
    network = VQA(sizes)
    tiny_blip.randomized(network, 5)
    return network.eval()


@pytest.fixture(scope="module")
def reference(vqa: VQA) -> nn.Module:
    from transformers import BlipForQuestionAnswering

    state = task_to_published(dict(vqa.named_parameters()))
    model = BlipForQuestionAnswering(blip_config(BlipWeights("vqa", vqa.config, state, "random")))
    model.load_state_dict(to_huggingface(state), strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(6))


def example(images: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """One image and its question, because transformers ignores the mask of padded questions."""
    return images[number : number + 1], torch.tensor([QUESTIONS[number]])


@torch.no_grad()
def encoded(vqa: VQA, images: Tensor) -> tuple[PackedText, Tensor]:
    questions = PackedText.from_lists(QUESTIONS)
    embeds = vqa.encode_image(images)
    return questions, vqa.encode_questions(questions, embeds, torch.arange(len(images)))


@torch.no_grad()
def test_states_and_logits(vqa: VQA, reference: nn.Module, images: Tensor) -> None:
    """All questions in one packed batch agree with one question at a time in transformers."""
    questions, states = encoded(vqa, images)
    order = torch.tensor([2, 0, 1])
    answers = PackedText.from_lists([ANSWERS[i] for i in order])
    logits = vqa.decode(answers, states, questions.segments, order)
    starts = questions.segments.offsets.tolist()
    rows = answers.segments.offsets.tolist()
    for place, number in enumerate(order.tolist()):
        pixels, ids = example(images, number)
        embeds = reference.vision_model(pixel_values=pixels)[0]
        state = reference.text_encoder(
            input_ids=ids, encoder_hidden_states=embeds, return_dict=True
        ).last_hidden_state
        ours = states[starts[number] : starts[number + 1]]
        torch.testing.assert_close(ours, state[0], **CLOSE)
        expected = reference.text_decoder(
            input_ids=torch.tensor([ANSWERS[number]]), encoder_hidden_states=state
        ).logits
        torch.testing.assert_close(logits[rows[place] : rows[place + 1]], expected[0], **CLOSE)


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_generated_answers(vqa: VQA, reference: nn.Module, images: Tensor, beams: int) -> None:
    """Answers agree token for token, with the published lengths."""
    questions, states = encoded(vqa, images)
    settings = BeamSettings(beams, max_length=10, min_length=1, scoring="huggingface")
    ours = caption_beam(vqa, states[None], [DEC], settings, questions.segments)
    for number in range(len(images)):
        pixels, ids = example(images, number)
        sequences = reference.generate(
            input_ids=ids, pixel_values=pixels, num_beams=beams, max_length=10, min_length=1
        )
        tokens = sequences[0, 1:].tolist()
        wanted = tokens[: tokens.index(SEP)] if SEP in tokens else tokens
        assert ours[number] == wanted
    assert any(ours)


def test_names_are_the_whole_published_layout(vqa: VQA) -> None:
    """And come back as they were."""
    ours = dict(vqa.named_parameters())
    state = task_to_published(ours)
    wanted = expected_shapes("vqa", vqa.config, None)
    assert {name: tensor.shape for name, tensor in state.items()} == wanted
    back = task_from_published(state, ours)
    assert set(back) == set(ours) - {"lm_head.weight"}
    assert all(torch.equal(back[name], ours[name]) for name in back)

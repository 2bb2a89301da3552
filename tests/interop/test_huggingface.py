"""MED against transformers' BLIP, with random weights copied across: outputs and captions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipTextConfig,
    BlipVisionConfig,
    PreTrainedModel,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from blip_scale.interop.huggingface_names import from_huggingface, to_huggingface
from blip_scale.interop.salesforce import from_salesforce, to_salesforce
from blip_scale.model.generation import (
    BeamSettings,
    NucleusSettings,
    caption_beam,
    caption_nucleus,
    nucleus,
)
from blip_scale.model.heads import Head
from blip_scale.model.initialization import init_weights
from blip_scale.model.med import MED, MEDConfig
from blip_scale.model.packing import PackedText
from blip_scale.model.text import SpecialTokens, TextConfig
from blip_scale.model.vision import VisionConfig

PAD, CLS, SEP, ENC, DEC = range(5)
VOCABULARY = 40
SENTENCES = [[CLS, 7, 8, SEP], [CLS, 9, SEP], [CLS, 7, 8, 9, 10, 11, SEP]]
PROMPT = [DEC, 12, 13]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def their_config() -> BlipConfig:
    vision = BlipVisionConfig(
        hidden_size=24,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        hidden_act="gelu",
        layer_norm_eps=1e-6,  # transformers' default is 1e-5
    )
    text = BlipTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        encoder_hidden_size=24,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,  # transformers' default is 8
        max_position_embeddings=24,
        bos_token_id=DEC,
        sep_token_id=SEP,
        pad_token_id=PAD,
        eos_token_id=SEP,
        is_decoder=True,
    )
    return BlipConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), image_text_hidden_size=16
    )


def our_config() -> MEDConfig:
    sizes = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8}
    special = SpecialTokens(pad=PAD, cls=CLS, sep=SEP, enc=ENC, dec=DEC)
    text = TextConfig(special, VOCABULARY, 32, 3, 4, 64, 24)
    return MEDConfig(VisionConfig("vit_tiny_patch16_224", 32, sizes), text, 16)


def randomize(model: torch.nn.Module, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = scale * torch.randn(parameter.shape, generator=generator)
            norm = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(drawn + 1 if norm else drawn)


def twins(reference: PreTrainedModel, scale: float = 0.2) -> tuple[MED, PreTrainedModel]:
    randomize(reference, scale)
    med = MED(our_config())
    init_weights(med, seed=0)
    parameters = dict(med.named_parameters())
    state = from_salesforce(from_huggingface(reference.state_dict()), parameters)
    assert state
    unknown = med.load_state_dict(state, strict=False).unexpected_keys
    assert not unknown
    return med.eval(), reference.eval()


@pytest.fixture
def retrieval() -> tuple[MED, PreTrainedModel]:
    return twins(BlipForImageTextRetrieval(their_config()))


@pytest.fixture
def captioning() -> tuple[MED, PreTrainedModel]:
    return twins(BlipForConditionalGeneration(their_config()))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def padded(first: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, SENTENCES))
    ids = torch.tensor([[first, *s[1:], *[PAD] * (longest - len(s))] for s in SENTENCES])
    return ids, (ids != PAD).long()


@torch.no_grad()
def test_image_embeddings_and_features(retrieval, images: Tensor) -> None:
    med, reference = retrieval
    embeds = med.encode_image(images)
    torch.testing.assert_close(embeds, reference.vision_model(images).last_hidden_state, **CLOSE)
    ids, mask = padded(CLS)
    expected = reference(ids, images, use_itm_head=False, attention_mask=mask)
    features = med.project_text(med.encode_text(PackedText.from_lists(SENTENCES)))
    states = reference.text_encoder(ids, attention_mask=mask).last_hidden_state[:, 0]
    their_features = torch.nn.functional.normalize(reference.text_proj(states), dim=-1)
    torch.testing.assert_close(features, their_features, **CLOSE)
    similarity = med.project_image(embeds) @ features.T
    torch.testing.assert_close(similarity, expected.itm_score, **CLOSE)


@torch.no_grad()
def test_matching_logits(retrieval, images: Tensor) -> None:
    med, reference = retrieval
    ids, mask = padded(ENC)
    expected = reference(ids, images, use_itm_head=True, attention_mask=mask).itm_score
    text = PackedText.from_lists(SENTENCES).with_first_token(ENC)
    logits = med.match(text, med.encode_image(images), torch.arange(3))
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_decoder_logits_and_loss(captioning, images: Tensor) -> None:
    med, reference = captioning
    ids, mask = padded(DEC)
    labels = ids.masked_fill(mask == 0, -100)
    expected = reference(images, ids, attention_mask=mask, labels=labels)
    text = PackedText.from_lists(SENTENCES).with_first_token(DEC)
    embeds = med.encode_image(images)
    logits = med.decode(text, embeds, torch.arange(3))
    torch.testing.assert_close(logits, expected.logits[mask.bool()], **CLOSE)
    enc = PackedText.from_lists(SENTENCES).with_first_token(ENC)
    _, lm_logits, targets = med.sweep(enc, text, embeds, torch.arange(3), torch.arange(3))
    loss = torch.nn.functional.cross_entropy(lm_logits, targets)
    torch.testing.assert_close(loss, expected.loss, **CLOSE)


def their_captions(reference: PreTrainedModel, images: Tensor, **settings) -> list[list[int]]:
    prompt = torch.tensor([[*PROMPT, SEP]] * len(images))
    sequences = reference.generate(
        images, prompt, attention_mask=torch.ones_like(prompt), **settings
    )
    captions = [ids[len(PROMPT) :] for ids in sequences.tolist()]
    return [ids[: ids.index(SEP)] if SEP in ids else ids for ids in captions]


def unruly(captioning, scale: float, bias: float) -> tuple[MED, PreTrainedModel]:
    """Large weights, so that captions differ between images; `bias` makes [SEP] likelier."""
    med, reference = twins(captioning[1], scale)
    with torch.no_grad():
        med.lm_head.bias[SEP] += bias
        reference.text_decoder.cls.predictions.bias[SEP] += bias
    return med, reference


@pytest.mark.parametrize("bias", [0.0, 4.0])
@pytest.mark.parametrize("repetition_penalty", [1.0, 1.3])
@pytest.mark.parametrize("beams", [1, 3, 5])
def test_greedy_and_beam_captions(
    captioning, images: Tensor, beams: int, repetition_penalty: float, bias: float
) -> None:
    med, reference = unruly(captioning, 0.4, bias)
    images = 3 * torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    settings = {"max_length": 14, "min_length": 6, "repetition_penalty": repetition_penalty}
    expected = their_captions(reference, images, num_beams=beams, do_sample=False, **settings)
    beam = BeamSettings(num_beams=beams, **settings, scoring="huggingface")
    ours = caption_beam(med, med.encode_image(images), PROMPT, beam)
    assert ours == expected
    assert len({tuple(caption) for caption in ours}) > 1


def test_beam_length_penalty(captioning, images: Tensor) -> None:
    med, reference = unruly(captioning, 0.4, 3.0)
    for penalty in (-1.0, 0.0, 2.0):
        settings = {"num_beams": 4, "max_length": 16, "min_length": 4, "length_penalty": penalty}
        expected = their_captions(reference, images, do_sample=False, **settings)
        beam = BeamSettings(**settings, scoring="huggingface")
        assert caption_beam(med, med.encode_image(images), PROMPT, beam) == expected


def test_nucleus_draws_what_theirs_draws(captioning, images: Tensor) -> None:
    """Equal random numbers give equal captions if the candidates come in the same order."""
    med, reference = unruly(captioning, 0.4, 1.0)
    settings = {"max_length": 14, "min_length": 6, "top_p": 0.9, "top_k": 20}
    settings |= {"repetition_penalty": 1.1}
    for seed in range(5):
        torch.manual_seed(seed)
        expected = their_captions(reference, images, do_sample=True, num_beams=1, **settings)
        torch.manual_seed(seed)
        ours = caption_nucleus(med, med.encode_image(images), PROMPT, NucleusSettings(**settings))
        assert ours == expected


def test_nucleus_by_given_numbers(
    captioning, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers gives equal captions if multinomial returns the same numbers.

    An image has the same caption alone and in any batch.
    """
    med, reference = unruly(captioning, 0.4, 1.0)
    settings = {"max_length": 14, "min_length": 6, "top_p": 0.9, "top_k": 20}
    sampling = NucleusSettings(**settings, repetition_penalty=1.1)
    for seed in range(5):
        draws = torch.rand((len(images), 14), generator=torch.Generator().manual_seed(seed))
        places = iter(range(len(PROMPT), 14))

        def choose(shares: Tensor, _: int, draws: Tensor = draws, places=places) -> Tensor:
            ends, place = shares.double().cumsum(-1), next(places)
            return (ends <= draws[:, place, None] * ends[:, -1:]).sum(-1, keepdim=True)

        with monkeypatch.context() as patched:
            patched.setattr(torch, "multinomial", lambda p, num_samples: choose(p, num_samples))
            expected = their_captions(
                reference, images, do_sample=True, num_beams=1, repetition_penalty=1.1, **settings
            )
        embeds = med.encode_image(images)
        assert caption_nucleus(med, embeds, PROMPT, sampling, draws) == expected
        for i, caption in enumerate(expected):
            single = slice(i, i + 1)
            alone = caption_nucleus(med, embeds[single], PROMPT, sampling, draws[single])
            assert alone == [caption]


def test_nucleus_keeps_what_theirs_keeps() -> None:
    logits = 3 * torch.randn(200, VOCABULARY, generator=torch.Generator().manual_seed(0))
    for top_p, top_k in ((0.9, 20), (0.5, 50), (0.01, 5), (1.0, 3)):
        expected = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, logits))
        ours = nucleus(logits, NucleusSettings(top_p=top_p, top_k=top_k))
        torch.testing.assert_close(ours, expected)


def test_training_mode_and_bad_lengths_are_refused(captioning, images: Tensor) -> None:
    med, _ = captioning
    embeds = med.encode_image(images)
    with pytest.raises(ValueError, match="max_length 3 counts the prompt"):
        caption_beam(med, embeds, PROMPT, BeamSettings(max_length=3))
    with pytest.raises(ValueError, match="eval mode"):
        caption_beam(med.train(), embeds, PROMPT)


@pytest.mark.parametrize("kind", ["retrieval", "captioning"])
def test_names_go_both_ways(kind: Head, request: pytest.FixtureRequest) -> None:
    med, reference = request.getfixturevalue(kind)
    back = to_huggingface(to_salesforce(dict(med.named_parameters()), kind))
    expected = reference.state_dict()
    assert back.keys() == {name for name in expected if not name.endswith("position_ids")}
    for name, value in back.items():
        assert torch.equal(value, expected[name]), name
    reference.load_state_dict(back, strict=True)

"""Image towers of all families: equal to timm's, filled, trained, resized, and refused by name."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor

from blip_scale.data.pixels.transforms import IMAGE_MEAN, IMAGE_STD, normalize_images
from blip_scale.interop.vision import fitted_positions
from blip_scale.model.compiling import compile_blocks
from blip_scale.model.flops import pretraining_flops
from blip_scale.model.initialization import init_weights, seeded
from blip_scale.model.med import MED, MEDConfig, MomentumEncoder
from blip_scale.model.text import SpecialTokens, TextConfig
from blip_scale.model.towers import BLIP_STATISTICS, ImageTower, refill_constants
from blip_scale.model.vision import VisionConfig, build_vision, training_tokens

SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}
TEXT = TextConfig(SpecialTokens(pad=0, cls=1, sep=2, enc=4, dec=3), 60, 32, 1, 4, 64, 24)
BATCH = 2
# fmt: off
FAMILIES = {
    "vit_base_patch16_224": 17, "deit_base_distilled_patch16_224": 19,
    "deit3_base_patch16_224": 17, "vit_base_patch16_clip_quickgelu_224.openai": 17,
    "vit_base_patch16_siglip_224.v2_webli": 17, "vit_base_patch16_siglip_gap_224": 17,
    "vit_small_patch14_reg4_dinov2": 21, "vit_giant_patch14_dinov2": 17,
    "vit_small_patch16_dinov3": 22, "vit_small_plus_patch16_dinov3_qkvb": 22,
    "vit_pe_core_base_patch16_224": 18, "vit_pe_spatial_base_patch16_512": 18,
    "eva02_tiny_patch14_224": 18, "eva02_base_patch14_224": 18,
    "eva02_base_patch16_clip_224": 17, "aimv2_large_patch14_224": 17,
    "beit_base_patch16_224": 18, "beitv2_base_patch16_224": 18,
    "vit_small_patch16_rope_mixed_224": 17,
}
# fmt: on
"""timm name -> tokens of an image of 16 patches, the pooled feature included."""
EVERY = pytest.mark.parametrize("name", FAMILIES)
SOME = pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_siglip_224.v2_webli",
        "vit_small_plus_patch16_dinov3_qkvb",
        "beitv2_base_patch16_224",
    ],
)


def network(name: str, image_size: int = 32, **settings: float) -> MED:
    """A MED with filled weights, in evaluation mode."""
    config = MEDConfig(VisionConfig(name, image_size, SIZES, **settings), TEXT, 16)
    med = seeded(lambda: MED(config), seed=3)
    init_weights(med, seed=3, vision_std=0.2)
    return med.eval()


def pixels(size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (BATCH, 3, size, size), generator=generator, dtype=torch.uint8)


def normalized_by(statistics: tuple[tuple[float, ...], ...], images: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    return (images / 255 - mean) / deviation


@EVERY
@torch.no_grad()
def test_tokens_and_pooled_feature_are_timms(name: str) -> None:
    """timm gets pixels by its constants, the tower BLIP's pixels. Also without weights' memory."""
    tower = network(name).vision
    timms = timm.create_model(name, img_size=32, num_classes=0, **SIZES).eval()
    timms.load_state_dict(tower.state_dict())
    images = normalize_images(pixels(), torch.float32)
    weights = timms.pretrained_cfg
    plain = name == "vit_base_patch16_224"
    statistics = BLIP_STATISTICS if plain else (weights["mean"], weights["std"])
    expected = normalized_by(statistics, pixels())
    tokens = tower(images)
    assert tokens.shape == (BATCH, FAMILIES[name], 24) == (BATCH, training_tokens(tower), 24)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(tokens[:, 0], timms(expected), **close)
    of_timm = timms.fc_norm(timms.forward_features(expected))
    torch.testing.assert_close(tokens[:, tower.added_tokens :], of_timm, **close)

    with torch.device("meta"):
        loaded = build_vision(VisionConfig(name, 32, SIZES)).eval()
    loaded.load_state_dict(tower.state_dict(), assign=True)
    refill_constants(loaded, torch.device("cpu"))
    assert torch.equal(loaded(images), tokens)


@EVERY
def test_every_parameter_is_drawn_and_trains(name: str) -> None:
    """Two networks of one seed are equal. The momentum copy gives the pooled feature alone."""
    med, again = network(name), network(name)
    images = normalize_images(pixels(), torch.float32)
    for (key, parameter), other in zip(
        med.vision.named_parameters(), again.vision.parameters(), strict=True
    ):
        assert torch.equal(parameter, other) and parameter.isfinite().all(), key
    med.vision.train()(images).square().sum().backward()
    assert [k for k, p in med.vision.named_parameters() if p.grad is None] == []
    momentum = MomentumEncoder(med.config)
    momentum.load_state_dict(med.state_dict(), strict=False)
    with torch.no_grad():
        pooled = momentum.train().encode_image(images)
        expected = med.eval().encode_image(images)
        torch.testing.assert_close(
            momentum.project_image(pooled), med.project_image(expected), atol=1e-6, rtol=1e-5
        )
    assert pretraining_flops(med.config, BATCH, 10, 16) > 0


@SOME
def test_checkpointed_and_compiled_blocks_give_the_same(name: str) -> None:
    vision = network(name).vision
    images = normalize_images(pixels(), torch.float32)
    gradients = []
    for is_checkpointed in (False, True):
        vision.set_grad_checkpointing(is_checkpointed)
        vision.zero_grad()
        vision(images).square().sum().backward()
        gradients.append([parameter.grad for parameter in vision.parameters()])
    torch.testing.assert_close(*gradients)
    vision.set_grad_checkpointing(False)
    with torch.no_grad():
        expected = vision(images)
        compile_blocks(vision, backend="eager")
        torch.testing.assert_close(vision(images), expected, atol=1e-5, rtol=1e-5)


@SOME
@torch.no_grad()
def test_another_image_size(name: str) -> None:
    small, large = network(name).vision, network(name, image_size=48).vision
    large.load_state_dict(fitted_positions(small.state_dict(), large))
    tokens = large(normalize_images(pixels(48), torch.float32))
    assert tokens.shape[1] == FAMILIES[name] + 36 - 16 and tokens.isfinite().all()


@torch.no_grad()
def test_beits_table_is_resized_as_timm_does() -> None:
    name = "beitv2_base_patch16_224"
    small = network(name).vision
    for parameter in small.parameters():
        parameter.copy_(torch.randn(parameter.shape))
    timms = timm.create_model(name, img_size=32, num_classes=0, **SIZES)
    timms.load_state_dict(small.state_dict())
    timms.set_input_size((48, 48))
    large = network(name, image_size=48).vision
    fitted = fitted_positions(small.state_dict(), large)
    for key, expected in timms.state_dict().items():
        assert torch.equal(fitted[key], expected), key


@pytest.mark.parametrize(
    ("name", "setting", "is_blips"),
    [
        ("deit_base_patch16_224", "auto", True),
        ("vit_large_patch16_224.augreg_in21k", "auto", True),
        ("vit_large_patch16_224.augreg_in21k", "tower", False),
        ("vit_small_patch14_dinov2", "auto", False),
        ("vit_small_patch14_dinov2", "blip", True),
    ],
)
def test_pixels_of_published_vits_stay_blips(name: str, setting: str, is_blips: bool) -> None:
    assert BLIP_STATISTICS == (IMAGE_MEAN, IMAGE_STD)
    config = VisionConfig(name, normalization=setting)
    assert (config.statistics == BLIP_STATISTICS) == is_blips


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (VisionConfig("naflexvit_base_patch16_siglip"), "any aspect ratio.*siglip_256"),
        (VisionConfig("swin_tiny_patch4_window7_224"), "swin_transformer.*expected one of"),
        (VisionConfig("vit_base_mci_224"), "a CNN before its blocks"),
        (VisionConfig("vit_base_patch16_xp_224"), "ParallelScalingBlock"),
        (VisionConfig("vit_base_patch16_siglip_224.none"), "Invalid pretrained tag"),
        (VisionConfig("beitv2_base_patch16_224", patch_dropout=0.5), "patch_dropout: .* set it"),
        (VisionConfig("vit_small_patch16_dinov3", 40), "40 is not a multiple of the patch size 16"),
    ],
)
def test_names_that_cannot_work(config: VisionConfig, expected: str) -> None:
    with pytest.raises(ValueError, match=expected), torch.device("meta"):
        build_vision(config)


def test_dropped_patches_and_frozen_blocks_of_a_rotary_tower() -> None:
    config = VisionConfig(
        "vit_pe_core_base_patch16_224", 32, SIZES, patch_dropout=0.5, frozen_layers=1
    )
    tower = build_vision(config)
    init_weights(MED(MEDConfig(config, TEXT, 16)), seed=0)
    tokens = tower.train()(torch.randn(BATCH, 3, 32, 32))
    assert tokens.shape[1] == training_tokens(tower) == 1 + 1 + 8
    trains = {name.split(".")[0] for name, p in tower.named_parameters() if p.requires_grad}
    assert trains == {"blocks", "norm", "attn_pool"}
    assert isinstance(tower, ImageTower)

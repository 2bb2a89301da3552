"""The ViT: equal to timm's, with patch dropout and frozen layers, and refused settings."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F

from blip_scale.model.initialization import init_weights
from blip_scale.model.med import MED, MEDConfig, MomentumEncoder
from blip_scale.model.text import SpecialTokens, TextConfig
from blip_scale.model.vision import VisionConfig, build_vision, training_tokens

SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}


@pytest.mark.parametrize("extra", [{}, {"init_values": 0.1, "qk_norm": True, "reg_tokens": 2}])
@torch.no_grad()
def test_our_attention_gives_timms_tokens(extra: dict[str, float]) -> None:
    torch.manual_seed(0)
    timms = timm.create_model("vit_tiny_patch16_224", img_size=32, **SIZES, **extra).eval()
    ours = build_vision(VisionConfig("vit_tiny_patch16_224", 32, SIZES | extra)).eval()
    ours.load_state_dict({n: v for n, v in timms.state_dict().items() if "head" not in n})
    images = torch.randn(2, 3, 32, 32)
    expected = timms.forward_features(images)
    torch.testing.assert_close(ours(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "vit_large_patch16_224"])
@pytest.mark.parametrize("image_size", [224, 384])
def test_published_sizes(name: str, image_size: int) -> None:
    with torch.device("meta"):
        vision = build_vision(VisionConfig(name, image_size))
    count = sum(parameter.numel() for parameter in vision.parameters())
    assert (
        count
        == {
            ("vit_base_patch16_224", 224): 85_798_656,
            ("vit_base_patch16_224", 384): 86_090_496,
            ("vit_large_patch16_224", 224): 303_301_632,
            ("vit_large_patch16_224", 384): 303_690_752,
        }[name, image_size]
    )
    eps = {m.eps for m in vision.modules() if isinstance(m, torch.nn.LayerNorm)}
    assert eps == {1e-6}


def tiny(**settings: float) -> MEDConfig:
    """Settings of a MED whose ViT has 17 tokens and 2 blocks."""
    text = TextConfig(SpecialTokens(pad=0, cls=1, sep=2, enc=4, dec=3), 60, 32, 1, 4, 64, 24)
    return MEDConfig(VisionConfig("vit_tiny_patch16_224", 32, SIZES, **settings), text, 16)


@pytest.mark.parametrize(("share", "kept"), [(0.5, 8), (0.3, 11), (0.99, 1)])
def test_patches_are_dropped_in_training_alone(share: float, kept: int) -> None:
    """Every image loses other patches. The class token stays. The momentum encoder sees all."""
    plain, med = MED(tiny()), MED(tiny(patch_dropout=share))
    init_weights(plain, seed=1)
    med.load_state_dict(plain.state_dict())  # no parameter more, none less
    images = torch.randn(3, 3, 32, 32)
    assert med.train().encode_image(images).shape == (3, 1 + kept, 24)
    assert training_tokens(med.vision) == 1 + kept
    torch.testing.assert_close(med.eval().encode_image(images), plain.encode_image(images))
    momentum = MomentumEncoder(med.config)
    momentum.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(  # the momentum encoder returns the class token alone
        momentum.train().encode_image(images), plain.encode_image(images)[:, :1]
    )
    patches = torch.arange(16.0).expand(64, 16)[..., None]
    dropped = med.vision.patch_drop.train()(torch.cat([-torch.ones(64, 1, 1), patches], 1))
    assert (dropped[:, 0] == -1).all()
    draws = {tuple(sorted(image.flatten().tolist()[1:])) for image in dropped}
    assert len(draws) > 8 and all(len(set(draw)) == kept for draw in draws)


def test_other_sizes_interpolate_the_positions_in_the_forward() -> None:
    """Images of another size see interpolated positions, and the weights keep the first grid.

    The expected positions are bicubic with antialiasing, written out as for a grid of channels.
    """
    vision = build_vision(VisionConfig("vit_tiny_patch16_224", 32, SIZES, other_sizes=(16,)))
    plain = build_vision(VisionConfig("vit_tiny_patch16_224", 32, SIZES))
    small = build_vision(VisionConfig("vit_tiny_patch16_224", 16, SIZES))
    for parameter in vision.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    weights = vision.state_dict()
    plain.load_state_dict(weights)
    class_token, patches = weights["pos_embed"][:, :1], weights["pos_embed"][:, 1:]
    grid = patches.transpose(1, 2).unflatten(2, (4, 4))
    grid = F.interpolate(grid, (2, 2), mode="bicubic", antialias=True, align_corners=False)
    positions = torch.cat([class_token, grid.flatten(2).transpose(1, 2)], dim=1)
    small.load_state_dict(weights | {"pos_embed": positions})
    large_images, small_images = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 16, 16)
    assert torch.equal(vision(large_images), plain(large_images))
    torch.testing.assert_close(vision(small_images), small(small_images))
    vision(small_images).square().sum().backward()
    assert vision.pos_embed.grad.shape == (1, 17, 24)
    with pytest.raises(
        ValueError, match=r"data.image_sizes: 20 is not a multiple of the patch size"
    ):
        build_vision(VisionConfig("vit_tiny_patch16_224", 32, SIZES, other_sizes=(20,)))


def test_no_patch_dropout_draws_no_random_numbers() -> None:
    vision = build_vision(VisionConfig("vit_tiny_patch16_224", 32, SIZES)).train()
    before = torch.get_rng_state()
    vision(torch.randn(1, 3, 32, 32, generator=torch.Generator()))
    assert torch.equal(before, torch.get_rng_state())
    assert isinstance(vision.patch_drop, torch.nn.Identity)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_layers_have_no_gradient(checkpointing: bool) -> None:
    """The first blocks and all before them have no gradient. The others' gradients are equal."""
    images, gradients = torch.randn(2, 3, 32, 32), []
    for layers in (0, 1):
        config = VisionConfig("vit_tiny_patch16_224", 32, SIZES, frozen_layers=layers)
        vision = build_vision(config, gradient_checkpointing=checkpointing).train()
        torch.manual_seed(0)
        for parameter in vision.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        vision(images)[:, 0].square().sum().backward()
        gradients.append({n: p.grad for n, p in vision.named_parameters() if p.grad is not None})
    every, some = gradients
    still = [name for name in every if name not in some]
    assert {name.split(".")[0] for name in still} == {
        "cls_token", "pos_embed", "patch_embed", "blocks",
    }  # fmt: skip
    assert {name[:9] for name in still if name.startswith("blocks")} == {"blocks.0."}
    assert {name[:9] for name in some} == {"blocks.1.", "norm.weig", "norm.bias"}
    for name, gradient in some.items():
        torch.testing.assert_close(gradient, every[name], rtol=0, atol=0)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.vision.frozen_layers: 3, .* give 2 or fewer"):
        build_vision(VisionConfig("vit_tiny_patch16_224", 32, SIZES, frozen_layers=3))
    with pytest.raises(ValueError, match=r"did you mean .*vit_base_patch16_224.*\?"):
        build_vision(VisionConfig("vit_base_patch16_244"))
    with pytest.raises(ValueError, match="multiple of the patch size 8"):
        build_vision(VisionConfig("vit_tiny_patch16_224", 30, SIZES))
    with pytest.raises(ValueError, match="embed_dims"):
        build_vision(VisionConfig("vit_tiny_patch16_224", 32, {"embed_dims": 24}))
    with pytest.raises(ValueError, match="resnet18"):
        build_vision(VisionConfig("resnet18", 32))
    with pytest.raises(ValueError, match="class token"):
        build_vision(VisionConfig("vit_tiny_patch16_224", 32, SIZES | {"class_token": False}))

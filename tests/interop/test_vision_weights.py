"""Vision weights from files, and interpolated position embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from blip_scale.interop.vision import interpolate_positions, load_vision
from blip_scale.model.initialization import init_weights
from blip_scale.model.med import MED, MEDConfig
from blip_scale.model.text import SpecialTokens, TextConfig
from blip_scale.model.vision import VisionConfig

SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}
TEXT = TextConfig(SpecialTokens(0, 1, 2, 3, 4), 20, 16, 1, 2, 32, 10)


def tiny_med(image_size: int = 32, **overrides: int) -> MED:
    vision = VisionConfig("vit_tiny_patch16_224", image_size, SIZES | overrides)
    med = MED(MEDConfig(vision, TEXT, 16))
    init_weights(med, seed=0)
    return med.eval()


def timm_vit(image_size: int = 32, **changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=image_size, num_classes=7, **SIZES, **changes
    ).eval()


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "visual_encoder."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timm_weights_give_timm_tokens(tmp_path: Path, suffix: str, prefix: str) -> None:
    vit = timm_vit()
    state = {prefix + name: value for name, value in vit.state_dict().items()}
    path = tmp_path / f"vit{suffix}"
    if suffix == ".pth":
        torch.save({"model": state}, path)
    else:
        save_file(state, path)
    med = tiny_med()
    load_vision(med, path)
    images = torch.randn(2, 3, 32, 32)
    expected = vit.forward_features(images)
    torch.testing.assert_close(med.encode_image(images), expected, atol=1e-5, rtol=1e-5)


def test_positions_are_interpolated_to_the_resolution(tmp_path: Path) -> None:
    vit = timm_vit(32)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    med = tiny_med(48)
    load_vision(med, tmp_path / "vit.pth")
    old, new = vit.pos_embed, med.vision.pos_embed
    assert new.shape == (1, 37, 24)
    assert torch.equal(new[:, 0], old[:, 0])
    square = old[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    expected = F.interpolate(square, (6, 6), mode="bicubic", align_corners=False)
    torch.testing.assert_close(new[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, 36, 24))
    assert med.encode_image(torch.randn(1, 3, 48, 48)).shape == (1, 37, 24)


def test_positions_of_a_known_ramp() -> None:
    """Far from the borders a linear ramp stays one, within the cubic kernel's ripple."""
    ramp = torch.arange(14.0).repeat_interleave(14).view(1, 196, 1)
    positions = interpolate_positions(torch.cat([torch.full((1, 1, 1), 9.0), ramp], 1), (24, 24))
    assert positions.shape == (1, 577, 1) and positions[0, 0, 0] == 9.0
    rows = positions[0, 1:, 0].view(24, 24)[4:20, 12]
    expected = (torch.arange(4, 20) + 0.5) * 14 / 24 - 0.5
    torch.testing.assert_close(rows, expected, atol=0.06, rtol=0)
    same = torch.randn(1, 10, 4)
    assert interpolate_positions(same, (3, 3)) is same
    with pytest.raises(ValueError, match="not a square grid"):
        interpolate_positions(torch.zeros(1, 12, 4), (3, 3))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    torch.save(timm_vit().state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=r"unknown \['blocks\.1\."):
        load_vision(tiny_med(depth=1), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=r"patch_embed\.proj\.weight \(24, 3, 8, 8\), wanted"):
        load_vision(tiny_med(patch_size=16), tmp_path / "vit.pth")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_vision(tiny_med(), tmp_path / "nowhere.pth")
    torch.save({"model": {}, "config": Path("x")}, tmp_path / "unsafe.pth")
    with pytest.raises(ValueError, match="more than tensors"):
        load_vision(tiny_med(), tmp_path / "unsafe.pth")


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["vit_base_patch16_siglip_224.v2_webli", "eva02_base_patch14_224", "beitv2_base_patch16_224"],
)
def test_weights_of_other_towers(tmp_path: Path, name: str) -> None:
    """The classifier is left out, a norm after the pooling is not, and positions are resized."""
    sizes = SIZES | {"num_heads": 3}
    timms = timm.create_model(name, img_size=32, num_classes=7, **sizes).eval()
    for parameter in timms.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.2)
    save_file(timms.state_dict(), tmp_path / "tower.safetensors")
    images = torch.randn(2, 3, 32, 32)
    for image_size in (32, 48):
        vision = VisionConfig(name, image_size, sizes, normalization="blip")
        med = MED(MEDConfig(vision, TEXT, 16)).eval()
        load_vision(med, tmp_path / "tower.safetensors")
        if image_size == 32:
            expected = timms.forward_head(timms.forward_features(images), pre_logits=True)
            pooled = med.encode_image(images)[:, 0]
            torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-5)
        else:
            assert med.encode_image(torch.randn(1, 3, 48, 48)).isfinite().all()

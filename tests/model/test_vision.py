"""The ViT: what timm builds, and what is refused."""

from __future__ import annotations

import pytest
import timm
import torch

from blip_scale.model import VisionConfig, build_vision

SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}


@pytest.mark.parametrize("extra", [{}, {"init_values": 0.1, "qk_norm": True, "reg_tokens": 2}])
@torch.no_grad()
def test_our_attention_gives_timms_tokens(extra: dict[str, float]) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, **SIZES, **extra).eval()
    ours = build_vision(VisionConfig("vit_tiny_patch16_224", 32, SIZES | extra)).eval()
    ours.load_state_dict({n: v for n, v in theirs.state_dict().items() if "head" not in n})
    images = torch.randn(2, 3, 32, 32)
    expected = theirs.forward_features(images)
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


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match=r"near: .*vit_base_patch16_224"):
        build_vision(VisionConfig("vit_base_patch16_244"))
    with pytest.raises(ValueError, match="multiple of the patch size 8"):
        build_vision(VisionConfig("vit_tiny_patch16_224", 30, SIZES))
    with pytest.raises(ValueError, match="embed_dims"):
        build_vision(VisionConfig("vit_tiny_patch16_224", 32, {"embed_dims": 24}))
    with pytest.raises(ValueError, match="resnet18"):
        build_vision(VisionConfig("resnet18", 32))
    with pytest.raises(ValueError, match="class token"):
        build_vision(VisionConfig("vit_tiny_patch16_224", 32, SIZES | {"class_token": False}))

"""LoRA adapters: they are in the path of every attention, and equal their closed form."""

from __future__ import annotations

import copy
import re
import sys
from dataclasses import replace

import pytest
import torch
from tiny_med import CLS, DEC, ENC, SENTENCES, tiny_config
from torch import Tensor, nn

from blip_scale.engine.zero.onednn import take_onednn
from blip_scale.model.adapters import (
    Adapters,
    Part,
    add_adapters,
    is_adapter,
    merged,
    part_of,
    plain_name,
)
from blip_scale.model.compiling import compile_blocks
from blip_scale.model.heads import Head, build_network
from blip_scale.model.initialization import init_weights, seeded
from blip_scale.model.med import MED, MEDConfig, MomentumEncoder
from blip_scale.model.packing import PackedText
from blip_scale.model.vision import VisionConfig

ALL: tuple[Part, ...] = ("vision", "text", "cross_attention")
PAIRS = len(SENTENCES)
SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}


def adapted(config: MEDConfig, targets: tuple[Part, ...] = ALL, **changes: object) -> MED:
    """A MED with adapters whose B is not zero."""
    med = seeded(lambda: MED(config), 3)
    init_weights(med, seed=1)
    add_adapters(med, Adapters(4, 6.0, targets, **changes))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in med.named_parameters():
            if name.endswith("lora_B.default.weight"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return med.eval()


def outputs(med: MED) -> list[Tensor]:
    """Features of both towers, and logits of ITM and LM."""
    images = torch.randn(PAIRS, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    text, every = PackedText.from_lists(SENTENCES), torch.arange(PAIRS)
    embeds = med.encode_image(images)
    states = med.encode_text(text.with_first_token(CLS))
    itm, lm, _ = med.sweep(
        text.with_first_token(ENC), text.with_first_token(DEC), embeds, every, every
    )
    return [med.project_image(embeds), med.project_text(states), itm, lm]


@pytest.mark.parametrize("targets", [ALL, *((part,) for part in ALL)], ids=str)
@torch.no_grad()
def test_adapters_equal_their_closed_form(targets: tuple[Part, ...]) -> None:
    """W + B A * alpha / rank, written out per layer; other outputs than without adapters."""
    med, plain = adapted(tiny_config(), targets), MED(tiny_config()).eval()
    init_weights(plain, seed=1)
    before = outputs(plain)
    for name, module in plain.named_modules():
        layer = dict(med.named_modules())[name]
        if hasattr(layer, "base_layer"):
            assert part_of(f"{name}.weight") in targets
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            module.weight += up @ down * (6.0 / 4)
    after, expected = outputs(med), outputs(plain)
    for value, closed_form in zip(after, expected, strict=True):
        torch.testing.assert_close(value, closed_form, atol=1e-5, rtol=0)
    changed = [(a - b).abs().max() > 1e-3 for a, b in zip(after, before, strict=True)]
    reads_vision, reads_text = "vision" in targets, "text" in targets
    assert changed == [reads_vision, reads_text, True, True]

    loaded = MED(tiny_config()).eval()
    state = merged(dict(med.named_parameters()), 6.0 / 4)
    loaded.load_state_dict(state | {"lm_head.weight": state["text.embeddings.word.weight"]})
    for value, closed_form in zip(outputs(loaded), expected, strict=True):
        torch.testing.assert_close(value, closed_form, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name", ["eva02_tiny_patch14_224", "beitv2_base_patch16_224", "vit_pe_core_base_patch16_224",
             "vit_base_patch16_siglip_224", "vit_base_patch16_dinov3"],
)  # fmt: skip
@torch.no_grad()
def test_adapters_are_in_the_path_of_every_tower(name: str) -> None:
    """Some of timm's attentions read the weight of qkv themselves."""
    config = replace(tiny_config(), vision=VisionConfig(name, 32, SMALL))
    med, plain = adapted(config, ("vision",)), MED(config).eval()
    for parameter_name, parameter in med.named_parameters():
        if "gamma" in parameter_name:  # layer scale, which begins near zero
            parameter.fill_(1.0)
    state = merged(dict(med.named_parameters()), 6.0 / 4)
    plain.load_state_dict(state | {"lm_head.weight": state["text.embeddings.word.weight"]})
    images = torch.randn(2, 3, 32, 32)
    with_adapters = med.encode_image(images)
    torch.testing.assert_close(with_adapters, plain.encode_image(images), atol=1e-4, rtol=1e-4)
    for layer in med.modules():
        if hasattr(layer, "base_layer") and layer.out_features > layer.in_features:
            layer.lora_B["default"].weight.zero_()  # of qkv alone
    assert (med.encode_image(images) - with_adapters).abs().max() > 1e-3


@pytest.mark.parametrize("frozen_layers", [0, 2])
def test_only_adapters_and_what_is_asked_for_train(frozen_layers: int) -> None:
    config = tiny_config()
    config = replace(config, vision=replace(config.vision, frozen_layers=frozen_layers))
    trained: dict[str, set[str]] = {}
    for also_train in ("none", "heads", "rest"):
        med = adapted(config, ("vision",), also_train=also_train, first_block=frozen_layers)
        names = {name for name, parameter in med.named_parameters() if parameter.requires_grad}
        blocks = {name.split(".")[2] for name in names if is_adapter(name)}
        assert blocks == {str(number) for number in range(frozen_layers, 3)}
        trained[also_train] = {name for name in names if not is_adapter(name)}
        sum(value.float().sum() for value in outputs(med)).backward()
        graded = {name for name, p in med.named_parameters() if p.grad is not None}
        assert graded == names - {"temperature.value"}
    assert trained["none"] == set()
    modules = {name.partition(".")[0] for name in trained["heads"]}
    assert modules == {"vision_proj", "text_proj", "itm_head", "lm_head", "temperature"}
    assert "lm_head.weight" not in trained["heads"]  # it is the word embedding
    rest = {name for name, _ in MED(config).named_parameters() if part_of(name) != "vision"}
    assert trained["rest"] == rest


def test_the_momentum_encoder_shares_frozen_weights() -> None:
    config = tiny_config()
    med = adapted(config)
    momentum = MomentumEncoder(config)
    add_adapters(momentum, Adapters(4, 6.0, ALL))
    momentum.share_frozen(med)
    online = dict(med.named_parameters())
    for name, parameter in momentum.named_parameters():
        assert (parameter is online[name]) != online[name].requires_grad, name
    copies = sum(p.numel() for name, p in momentum.named_parameters() if online[name].requires_grad)
    assert copies < 0.3 * sum(p.numel() for p in MomentumEncoder(config).parameters())


HEADS_THAT_TRAIN: dict[Head, set[str]] = {
    "pretrain": {"vision_proj", "text_proj", "itm_head", "lm_head.dense", "lm_head.norm", "lm_head",
                 "temperature"},
    "retrieval": {"vision_proj", "text_proj", "itm_head", "temperature"},
    "captioning": {"lm_head.dense", "lm_head.norm", "lm_head"},
    "vqa": {"lm_head.dense", "lm_head.norm", "lm_head",
            "text_decoder.layers.N.cross_attention.key_value"},
    "nlvr2": {"cls_head.N", "text_encoder.layers.N.cross_attention.merge_layer"},
    "visdial": {"itm_head", "caption_proj"},
}  # fmt: skip
"""Modules of each head that train besides the adapters, where images and text differ in width."""


@pytest.mark.parametrize("head", HEADS_THAT_TRAIN)
def test_what_pretraining_lacks_trains_as_a_whole(head: Head) -> None:
    """Everything else keeps its weights, and every layer of an attention has an adapter."""
    plain = build_network(head, tiny_config())
    attentions = {
        name
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"attn|attention", name)
    }
    parameters = {name for name, _ in plain.named_parameters()}
    network = add_adapters(plain, Adapters(4, 6.0, ALL))
    names = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    layers = {plain_name(name).rpartition(".")[0] for name in filter(is_adapter, names)}
    whole = {plain_name(name).rpartition(".")[0] for name in names if not is_adapter(name)}
    assert {re.sub(r"\.\d+", ".N", module) for module in whole} == HEADS_THAT_TRAIN[head]
    assert layers == attentions - whole
    assert merged(dict(network.named_parameters()), 1.5).keys() == parameters


def test_equal_widths_leave_vqa_no_random_weights() -> None:
    """All of its decoder comes from pretraining, and so keeps it."""
    network = add_adapters(
        build_network("vqa", tiny_config(width=24, heads=2)), Adapters(4, 6, ALL)
    )
    names = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in names if not is_adapter(name)} == {"lm_head"}


def test_frozen_blocks_alone_cant_have_adapters() -> None:
    with pytest.raises(ValueError, match=r"model.lora.targets: no attention of the image tower"):
        add_adapters(MED(tiny_config()), Adapters(4, 6.0, ALL, first_block=3))


def test_a_missing_peft_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"model.lora needs peft.* `pip install peft accelerate`"):
        add_adapters(MED(tiny_config()), Adapters(4, 6.0, ALL))


@pytest.mark.parametrize("way", ["compiled", "onednn"])
def test_compiled_blocks_and_onednn_compute_the_same(way: str) -> None:
    med = adapted(tiny_config(layers=1))
    other: nn.Module = copy.deepcopy(med)
    if way == "compiled":
        torch._dynamo.reset()
        compile_blocks(other, backend="eager")
    else:
        take_onednn(other)
    for network in (med, other):
        sum(value.float().sum() for value in outputs(network)).backward()
    for value, expected in zip(outputs(other), outputs(med), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=0)
    gradients = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    for name, parameter in med.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-4, rtol=1e-3)

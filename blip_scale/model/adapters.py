"""LoRA adapters (Hu et al. 2021) on the attention of a network, added by peft.

The product W x of a linear layer becomes W x + B (A x) * alpha / rank. W is frozen; A and B are
trained. peft renames the parameters of such a layer `X`: X.weight to X.base_layer.weight, and
X.bias to X.base_layer.bias. The parameters of the adapter are X.lora_A.default.weight [rank, in]
and X.lora_B.default.weight [out, rank].
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

N = TypeVar("N", bound=nn.Module)
Part = Literal["vision", "text", "cross_attention"]
"""Part of a network that can have adapters. Modules outside these parts are heads."""
AlsoTrained = Literal["heads", "rest", "none"]

KEY = "lora"
"""Key of a checkpoint's task state that holds rank, alpha and targets of its adapters."""
_BASE = ".base_layer."
_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"
_ATTENTION: dict[Part, re.Pattern[str]] = {
    "vision": re.compile(r"vision\.blocks\.(?P<block>\d+)\.attn\.\w+"),
    "text": re.compile(r"text(_encoder|_decoder)?\.layers\.\d+\.self_attention_\w+\.\w+"),
    "cross_attention": re.compile(
        r"text(_encoder|_decoder)?\.layers\.\d+\.cross_attention\.(images\.\d\.)?(?!merge)\w+"
    ),
}
"""Part -> pattern of the names of the modules in its attention."""


@dataclass(frozen=True)
class Adapters:
    """Settings of a network's LoRA adapters, and of the other parameters that are trained."""

    rank: int
    alpha: float
    """Numerator of the adapter's factor alpha / rank."""
    targets: tuple[Part, ...]
    """Parts whose attention gets adapters."""
    dropout: float = 0.0
    """Dropout probability of the adapter's input."""
    also_train: AlsoTrained = "heads"
    """Parameters that are trained besides the adapters: only the heads (`heads`), also the parts
    that are no targets (`rest`), or none."""
    first_block: int = 0
    """Index of the first ViT block with adapters. The blocks before it are frozen."""

    @property
    def scale(self) -> float:
        """Factor of the product B A."""
        return self.alpha / self.rank

    def trains(self, part: Part | None) -> bool:
        """Whether the parameters of a part are trained, adapters aside. None means the heads."""
        if self.also_train == "rest":
            return part not in self.targets
        return part is None and self.also_train == "heads"


def part_of(name: str) -> Part | None:
    """Return the part that a parameter belongs to, by its plain name; None for a head."""
    section = name.partition(".")[0]
    if section == "vision":
        return "vision"
    if section not in ("text", "text_encoder", "text_decoder") or ".merge_layer." in name:
        return None  # NLVR2's merge layers are in no pretrained checkpoint
    return "cross_attention" if ".cross_attention." in name else "text"


def begins_at_random(name: str, network: nn.Module) -> bool:
    """Whether no pretrained weights fit a layer of the text stack. It is then treated as a head.

    This holds for the keys and values of VQA's decoder if images and text differ in width (ViT-L):
    these layers read the states of questions, while the pretrained ones read image tokens.

    Args:
        name: plain name of the layer or of one of its parameters.
        network: network that holds it.
    """
    if not name.startswith("text_decoder.") or ".cross_attention.key_value" not in name:
        return False
    config: Any = network.config
    vision: Any = network.vision
    return bool(config.text.width != vision.embed_dim)


def freeze_text(network: N) -> N:
    """Freeze the text stacks except cross-attention. Return the same network."""
    for name, parameter in network.named_parameters():
        if part_of(name) == "text":
            parameter.requires_grad_(False)
    return network


def add_adapters(network: N, adapters: Adapters) -> N:
    """Add adapters to the linear layers of the targets' attention, and freeze other parameters.

    The initial weights are peft's: A random, B zero. Layers that begin at random get no adapters.

    Args:
        network: network of a head or momentum encoder; changed in place.
        adapters: settings.

    Returns:
        The same network.

    Raises:
        ValueError: all blocks of the ViT are frozen, or peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            "model.lora needs peft, which is not installed: run `pip install peft accelerate`, or "
            "install blip-scale with the extra lora"
        ) from error
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    layers = _target_layers(network, adapters)
    settings = peft.LoraConfig(
        r=adapters.rank,
        lora_alpha=adapters.alpha,  # type: ignore[arg-type]  # peft also takes floats
        lora_dropout=adapters.dropout,
        target_modules="|".join(map(re.escape, layers)),
    )
    with warnings.catch_warnings():
        # Under zero.Init a rank holds no elements of the new weights. `fill` sets them later.
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        peft.inject_adapter_in_model(settings, network)
    for name, parameter in network.named_parameters():
        if not is_adapter(name):
            plain = plain_name(name)
            part = None if begins_at_random(plain, network) else part_of(plain)
            parameter.requires_grad_(plain in trained and adapters.trains(part))
    attention: Any
    for attention in network.modules():
        if hasattr(attention, "qkv_bias_separate") and hasattr(attention.qkv, "base_layer"):
            # Otherwise timm reads the weight of qkv directly and bypasses the adapter.
            attention.qkv_bias_separate = True
    return network


def _target_layers(network: nn.Module, adapters: Adapters) -> list[str]:
    """List the names of the linear layers that get adapters."""
    names = []
    for name, module in network.named_modules():
        for part in adapters.targets:
            match = _ATTENTION[part].fullmatch(name)
            if match and isinstance(module, nn.Linear) and not begins_at_random(name, network):
                block = match.groupdict().get("block")
                if block is None or int(block) >= adapters.first_block:
                    names.append(name)
    if "vision" in adapters.targets and not any(part_of(name) == "vision" for name in names):
        raise ValueError(
            "model.lora.targets: no attention of the image tower can have adapters, as "
            "model.vision.frozen_layers freezes all of its blocks; remove vision, or freeze fewer"
        )
    return names


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return name.endswith((_A, _B))


def plain_name(name: str) -> str:
    """Return a parameter's name without adapters. For an adapter, return its base weight's name."""
    for suffix in (_A, _B):
        if name.endswith(suffix):
            return f"{name.removesuffix(suffix)}.weight"
    return name.replace(_BASE, ".")


def renamed(plain: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Rename weights to the names that they have in a network with adapters.

    Args:
        plain: weights by plain name.
        names: names of the network's parameters.
    """
    new_names = {plain_name(name): name for name in names if not is_adapter(name)}
    return {new_names.get(name, name): weight for name, weight in plain.items()}


def trained_shares(network: nn.Module) -> str:
    """Describe for the log how many parameters of each part of a network are trained."""
    trained: Counter[str] = Counter()
    total = 0
    for name, parameter in network.named_parameters():
        total += parameter.numel()
        if parameter.requires_grad:
            kind = "adapters" if is_adapter(name) else part_of(plain_name(name)) or "heads"
            trained[kind] += parameter.numel()
    shares = ", ".join(f"{kind} {count / 1e6:.2f}M" for kind, count in sorted(trained.items()))
    return f"{trained.total() / 1e6:.2f}M of {total / 1e6:.2f}M parameters train: {shares}"


def are_complete(names: Collection[str]) -> bool:
    """Whether both factors and the base weight of each adapter are among the names."""
    parts: set[str] = set()
    for name in filter(is_adapter, names):
        layer = name.removesuffix(_A).removesuffix(_B)
        parts |= {f"{layer}{_A}", f"{layer}{_B}", f"{layer}{_BASE}weight"}
    return parts <= set(names)


def adapter_shape(name: str, rank: int, base: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of an adapter's parameter for a base weight [out, in]."""
    return (rank, base[1]) if name.endswith(_A) else (base[0], rank)


def merged(parameters: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Merge the adapters into their base weights: W + B A * scale, under the plain names.

    Args:
        parameters: parameters by name. An adapter without its base weight is omitted.
        scale: `Adapters.scale`.
    """
    plain = {plain_name(n): tensor for n, tensor in parameters.items() if not is_adapter(n)}
    for name, tensor in parameters.items():
        base = plain_name(name)
        if name.endswith(_B) and base in plain:
            down = parameters[f"{name.removesuffix(_B)}{_A}"]
            plain[base] = plain[base] + scale * (tensor @ down)
    return plain

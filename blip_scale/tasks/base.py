"""Base class of the tasks: tokenizer, sizes of the network, loader and initial weights."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from blip_scale.config.batch_sizes import batch_sizes, is_auto
from blip_scale.config.recipe import Recipe
from blip_scale.data.heldout.pairs import HeldoutPairs
from blip_scale.data.loading.micro_batches import Batch, CaptionInput
from blip_scale.data.reading.inventory import inventory
from blip_scale.data.tokenizer import load_tokenizer
from blip_scale.engine import collectives
from blip_scale.engine.task import Evaluation, Progress
from blip_scale.engine.watching.monitor import Alarm
from blip_scale.engine.watching.reference_alarms import chosen_reference
from blip_scale.engine.zero.engine import ZeroEngine
from blip_scale.engine.zero.momentum import ShardedMomentum
from blip_scale.evaluation import captions_and_pairs
from blip_scale.inference.sizes import limited, med_config
from blip_scale.model import adapters
from blip_scale.model.adapters import plain_name, renamed, trained_shares
from blip_scale.model.heads import Head, cut_down
from blip_scale.model.initialization import seeded
from blip_scale.model.kernels import choose_kernel
from blip_scale.model.med import MED
from blip_scale.storage import files
from blip_scale.tasks import networks

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)


class TrainingTask(ABC):
    """Base class of the tasks that implements most of `engine.task.Task`.

    The attribute `med` of the task's network holds the network of `head` (see `model.heads`).
    """

    head: Head
    alarms: tuple[Alarm, ...] = ()

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.tokenizer = load_tokenizer(recipe.model.text)
        self.config = med_config(recipe, self.tokenizer)
        if recipe.model.lora.rank:  # refuse wrong settings here; the engine could only fail
            with torch.device("meta"):
                self.limited(MED(self.config))
        if is_auto(recipe):
            raise ValueError("train.max_micro_batch_size: auto was not resolved; give a number")
        sizes = batch_sizes(recipe, collectives.world_size())
        self.batch_size, self.accumulation = sizes.micro_batch, sizes.accumulation
        self.loader = networks.train_loader(recipe, self.text_input(), self.batch_size)
        self.steps_per_epoch = self.loader.steps_per_epoch
        self.reference, alarms = chosen_reference(recipe, self.loader.samples_per_epoch)
        self.alarms = (*self.alarms, *alarms)
        self.kernel = str(choose_kernel(recipe.model.attention, device, self.dtype))
        self.allowed_changes: frozenset[str] = frozenset()
        self.momentum_pairs: dict[str, str] = {}
        self._tokens = 0
        self._generator = torch.Generator(device)

    @abstractmethod
    def build_network(self) -> nn.Module:
        """Build the network, with unset weights."""

    @abstractmethod
    def inputs(self, batch: Any, progress: Progress) -> tuple[Any, ...]:
        """Return the network's arguments for a micro-batch, on the device."""

    @abstractmethod
    def evaluate(self, engine: ZeroEngine, final: bool) -> Evaluation:
        """Compute held-out metrics and pictures."""

    @abstractmethod
    def flops_per_step(self) -> float:
        """Estimate the FLOPs of one optimizer step on this rank from the last micro-batch."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and activations."""
        return torch.bfloat16 if self.recipe.train.precision == "bf16" else torch.float32

    def text_input(self) -> CaptionInput:
        """Return the settings that turn the texts of the training sets into tokens."""
        text = self.recipe.model.text
        return CaptionInput(
            self.tokenizer,
            text.max_tokens,
            text.max_words or CaptionInput.max_words,
            prompt=text.prompt,
            whole_sentences=text.truncation == "sentence",
        )

    def heldout_sets(self) -> Iterator[tuple[str, HeldoutPairs]]:
        """Yield the held-out sets by name. Texts are cleaned like those of the training sets."""
        text = self.text_input()
        return captions_and_pairs.heldout_sets(self.recipe, text.clean, text.max_words)

    def generator(self) -> torch.Generator:
        """Return the task's generator on its device, seeded for this micro-step.

        The seed is derived from torch's, which the training loop sets for each micro-step. The
        generator is always the same object, because a captured CUDA graph registers it.
        """
        return self._generator.manual_seed(own_seed())

    @classmethod
    def head_of(cls, recipe: Recipe) -> Head:
        """Return the head of the network that a recipe trains."""
        return cls.head

    def build_med(self) -> MED:
        """Build a MED that has only the modules of the head, with unset weights."""
        return self.limited(cut_down(MED(self.config), self.head))

    def limited(self, network: M) -> M:
        """Add the recipe's adapters to a network, and freeze the parts that the recipe freezes."""
        return limited(network, self.recipe.model)

    def initial_weights(self) -> dict[str, Tensor]:
        """Load the weights of the recipe's checkpoints, and draw the others from the seed.

        `model.checkpoint` may lack adapters, and trainable parameters outside `med` such as those
        of a loss. These keep the values that their constructors draw from the seed.
        """
        with torch.device("meta"):
            network = self.build_network()
        frozen = {plain_name(n) for n, p in network.named_parameters() if not p.requires_grad}
        plain = networks.initial_parameters(self.recipe, self.config, self.head, frozen)
        weights = renamed(plain, [name for name, _ in network.named_parameters()])
        med = network.get_submodule("med")
        if not all(parameter.requires_grad for parameter in med.parameters()):
            logger.info("%s", trained_shares(med))
        trainable = {name for name, p in network.named_parameters() if p.requires_grad}
        if trainable - weights.keys():
            network = seeded(self.build_network, self.recipe.seed)
            drawn = {name: p.detach() for name, p in network.named_parameters()}
            weights |= {name: drawn[name] for name in trainable - weights.keys()}
        return weights

    def keep_text(self, folder: Path) -> None:
        """Write the tokenizer, and the sizes of the text stack as the config.json of a BERT."""
        self.tokenizer.save_pretrained(folder)
        text = self.config.text
        sizes = {
            "model_type": "bert",
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "intermediate_size": text.mlp_width,
            "max_position_embeddings": text.max_positions,
            "layer_norm_eps": text.norm_eps,
            "hidden_act": "gelu",
        }
        files.write_whole(folder / "config.json", json.dumps(sizes, indent=1) + "\n")

    def inventory(self) -> list[dict[str, Any]]:
        """List the training streams with their shards."""
        return inventory(self.loader.stores)

    def batches(self) -> Iterator[Any]:
        """Yield this rank's micro-batches."""
        return iter(self.loader)

    @property
    def capture_obstacle(self) -> str | None:
        """Reason why a CUDA graph can't capture the forward; None if it can."""
        return f"the shapes of {self.recipe.task} depend on its data"

    def collect(  # noqa: B027  most tasks collect nothing
        self, outputs: dict[str, Tensor], progress: Progress
    ) -> None:
        """Keep nothing."""

    def figures(self, batch: Batch) -> dict[str, float]:
        """Compute the shares of each stream and caption role in a batch, and of cut captions."""
        names = [f"data/share_{name}" for name in self.loader.stream_names]
        shares = dict(zip(names, self.loader.shares(batch), strict=True))
        return shares | self.loader.caption_shares(batch)

    def after_step(  # noqa: B027  most tasks do nothing here
        self, engine: ZeroEngine, momentum: ShardedMomentum, applied: bool
    ) -> None:
        """Update nothing."""

    def metrics(self, engine: ZeroEngine, momentum: ShardedMomentum) -> dict[str, float]:
        """Return no metrics besides those of the steps."""
        return {}

    def whole_med(self, engine: ZeroEngine) -> MED:
        """Copy the whole MED to this rank's device, in evaluation mode. Call it on all ranks."""
        return self.whole(engine, self.build_med)

    def whole(self, engine: ZeroEngine, build: Callable[[], M]) -> M:
        """Copy the network `med`, built by `build`, like `whole_med`. Call it on all ranks."""
        with torch.device(self.device):
            med = build().to(engine.dtype)
        source = engine.module.get_submodule("med")
        engine.gather_into(source, med)
        return med.eval()

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the position of the loader, and the settings of the adapters if there are any."""
        state: dict[str, Any] = {"loader": self.loader.state_dict()}
        lora = self._adapters()
        return (state if lora is None else state | {adapters.KEY: lora}), {}

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse to resume with other adapters."""
        saved, here = state.get(adapters.KEY), self._adapters()
        if saved != here:
            raise ValueError(
                f"model.lora: {here or 'no adapters'}, but the checkpoint was trained with "
                f"{saved or 'no adapters'}; give the same settings, or begin a run from it with "
                "model.checkpoint and another output_dir"
            )

    def _adapters(self) -> dict[str, Any] | None:
        """Return the settings that are needed to use a checkpoint's adapters; None without any."""
        lora = self.recipe.model.lora
        if not lora.rank:
            return None
        return {"rank": lora.rank, "alpha": lora.alpha, "targets": sorted(lora.targets)}

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Restore the position of the loader."""
        self.loader.load_state_dict(state["loader"], self.allowed_changes)

    @property
    def samples_seen(self) -> int:
        """Number of samples that all ranks have read since the start of the run."""
        return self.loader.samples_seen

    @property
    def scheduled_steps(self) -> int:
        """Number of steps of the schedule that are done at the loader's position."""
        return self.loader.scheduled_steps

    def close(self) -> None:
        """Stop the loader's processes."""
        self.loader.close()


def own_seed() -> int:
    """Return the seed of the task's draws in a micro-step. It differs from torch's seed."""
    return torch.initial_seed() ^ 0x5EED

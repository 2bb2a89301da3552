"""The captured micro-step gives the same numbers as the eager one.

On the CPU, a stand-in for a CUDA graph follows the same rules: it runs the captured function on
the tensors of the capture, and writes into the same outputs. The `gpu` test at the end uses a real
CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blip_scale.engine import micro_step
from blip_scale.engine.micro_step import (
    WARM_UP_STEPS,
    Capturable,
    CapturedMicroStep,
    EagerMicroStep,
    MicroStepOutputs,
    choose_micro_step,
    cuda_graph,
)

WIDTH = 8


@dataclass(frozen=True)
class Keys:
    """Inputs in a dataclass, like packed texts and the inputs of the contrastive loss."""

    queue: Tensor
    weight: Tensor
    bound: int


class Network(nn.Module):
    """Network that uses a batch, a queue, a weight and random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.calls = 0

    def forward(self, rows: Tensor, keys: Keys, generator: torch.Generator) -> dict[str, Tensor]:
        self.calls += 1
        states = nn.functional.dropout(self.linear(rows), 0.5)
        noise = torch.empty(len(rows), device=rows.device).exponential_(generator=generator)
        scores = states @ keys.queue * keys.weight
        loss = (scores.square().mean(1) * noise).mean() + keys.bound
        return {"loss/total": loss, "noise": noise.sum(), "keys": states * 2}


class Engine:
    """Stand-in for `ZeroEngine`, with the methods that a micro-step calls."""

    capture_obstacle: str | None = None

    def __init__(self, network: Network) -> None:
        self.forward = network
        self.device = next(network.parameters()).device
        self.gradients = [torch.zeros_like(p) for p in network.parameters()]
        self._network = network

    def gather_weights(self) -> None:
        """Do nothing, because nothing is partitioned."""

    def compute_gradients(self, loss: Tensor) -> list[Tensor]:
        return [*torch.autograd.grad(loss, list(self._network.parameters()))]

    def add_gradients(self, gradients: list[Tensor], is_last: bool) -> None:
        for total, gradient in zip(self.gradients, gradients, strict=True):
            total += gradient

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self.add_gradients(self.compute_gradients(loss), is_last)


def rerun() -> micro_step.Capture:
    """Return a capture for the CPU, whose replay runs the captured function again."""

    def capture(
        function: Callable[[], Capturable], generators: Sequence[torch.Generator]
    ) -> tuple[micro_step.Replay, Capturable]:
        state = torch.get_rng_state()
        generator_states = [generator.get_state() for generator in generators]
        static = function()
        torch.set_rng_state(state)  # a capture does not advance the generators
        for generator, before in zip(generators, generator_states, strict=True):
            generator.set_state(before)

        def replay() -> None:
            results = function()
            static.outputs.scalars.copy_(results.outputs.scalars)
            for name, tensor in static.outputs.tensors.items():
                tensor.copy_(results.outputs.tensors[name])
            for tensor, gradient in zip(static.gradients, results.gradients, strict=True):
                tensor.copy_(gradient)

        return replay, static

    return capture


def steps(
    build: Callable[[Any, Network], Callable[..., MicroStepOutputs]],
    device: torch.device,
    lengths: Sequence[int],
) -> tuple[list[MicroStepOutputs], list[Tensor], Network]:
    """Run micro-steps, and return their outputs, the summed gradients and the network."""
    torch.manual_seed(0)
    network = Network().to(device)
    engine = Engine(network)
    run = build(engine, network)
    queue = torch.randn(WIDTH, 5, device=device)
    generator = torch.Generator(device)
    results = []
    for step, length in enumerate(lengths):
        torch.manual_seed(100 + step)
        generator.manual_seed(step)
        rows = torch.randn(length, WIDTH).to(device)
        keys = Keys(queue, torch.tensor(step / 2, device=device), bound=3)
        results.append(run((rows, keys, generator), is_last=True))
        queue[:, step % 5] += 1.0  # in place, like a feature queue
    return results, engine.gradients, network


LENGTHS = [4, 6, 4, 4, 6, 4, 6, 6, 5, 4]


def same(captured: tuple[Any, ...], eager: tuple[Any, ...]) -> None:
    for replayed, expected in zip(captured[0], eager[0], strict=True):
        assert replayed.names == expected.names == ("loss/total", "noise")
        torch.testing.assert_close(replayed.scalars, expected.scalars, rtol=0, atol=0)
        torch.testing.assert_close(replayed.tensors, expected.tensors, rtol=0, atol=0)
    torch.testing.assert_close(captured[1], eager[1], rtol=0, atol=0)


def test_replays_give_the_numbers_of_eager_steps() -> None:
    cpu = torch.device("cpu")
    eager = steps(lambda engine, network: EagerMicroStep(engine), cpu, LENGTHS)
    captures = []

    def build(engine: Any, network: Network) -> CapturedMicroStep:
        capture = rerun()

        def counted(*arguments: Any) -> Any:
            captures.append(network.calls)
            return capture(*arguments)

        return CapturedMicroStep(engine, counted)

    captured = steps(build, cpu, LENGTHS)
    same(captured, eager)
    # The first steps are eager. After them, 4 and 6 rows are captured at their second occurrence.
    # 5 rows occur once, so they are never captured.
    assert len(captures) == 2
    assert captures[0] == WARM_UP_STEPS + 2


def test_a_state_in_other_memory_is_captured_anew() -> None:
    network = Network()
    engine: Any = Engine(network)
    run = CapturedMicroStep(engine, rerun())
    eager = EagerMicroStep(engine)
    generator = torch.Generator()
    queue = torch.randn(WIDTH, 5)
    for step in range(WARM_UP_STEPS + 6):
        if step == WARM_UP_STEPS + 4:
            queue = queue * 2
        inputs = (torch.ones(3, WIDTH), Keys(queue, torch.tensor(1.0), bound=0), generator)
        torch.manual_seed(step)
        generator.manual_seed(step)
        replayed = run(inputs, is_last=True)
        torch.manual_seed(step)
        generator.manual_seed(step)
        torch.testing.assert_close(replayed.scalars, eager(inputs, is_last=True).scalars)


def test_outputs_survive_the_next_replay() -> None:
    network = Network()
    engine: Any = Engine(network)
    run = CapturedMicroStep(engine, rerun())
    keys = Keys(torch.randn(WIDTH, 5), torch.tensor(1.0), bound=0)
    results = [
        run((torch.full((3, WIDTH), float(step)), keys, torch.Generator()), is_last=True)
        for step in range(WARM_UP_STEPS + 4)
    ]
    assert not torch.equal(results[-1].tensors["keys"], results[-2].tensors["keys"])


@pytest.mark.parametrize("must", [False, True])
def test_a_capture_that_fails_leaves_eager_steps(
    must: bool, caplog: pytest.LogCaptureFixture
) -> None:
    cpu = torch.device("cpu")
    eager = steps(lambda engine, network: EagerMicroStep(engine), cpu, LENGTHS)

    def failing(function: Any, generators: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    def build(engine: Any, network: Network) -> CapturedMicroStep:
        return CapturedMicroStep(engine, failing, must_capture=must)

    if must:
        with pytest.raises(RuntimeError, match="capturing"):
            steps(build, cpu, LENGTHS)
        return
    same(steps(build, cpu, LENGTHS), eager)
    assert caplog.text.count("steps run eagerly: operation not permitted") == 1


def obstacle_engine(device: str, obstacle: str | None) -> Any:
    return SimpleNamespace(device=torch.device(device), capture_obstacle=obstacle)


@pytest.mark.parametrize(
    ("engine", "task", "reason"),
    [
        (obstacle_engine("cpu", None), None, "CUDA graphs run on CUDA devices, not on cpu"),
        (obstacle_engine("cuda", "weights are gathered"), None, "weights are gathered"),
        (obstacle_engine("cuda", None), "the shapes of vqa", "the shapes of vqa"),
    ],
)
def test_what_cannot_be_captured_runs_eager_and_says_why(
    engine: Any, task: str | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="blip_scale")
    assert isinstance(choose_micro_step(engine, "auto", task), EagerMicroStep)
    assert reason in caplog.text
    with pytest.raises(ValueError, match=f"model.cuda_graph: true, but {reason}"):
        choose_micro_step(engine, True, task)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_gives_the_numbers_of_eager_steps() -> None:
    cuda = torch.device("cuda")
    torch.cuda.set_stream(torch.cuda.Stream())
    eager = steps(lambda engine, network: EagerMicroStep(engine), cuda, LENGTHS)
    captured = steps(lambda engine, network: CapturedMicroStep(engine, cuda_graph()), cuda, LENGTHS)
    same(captured, eager)

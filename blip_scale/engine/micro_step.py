"""Forward and backward of one micro-batch, eager or as a replayed CUDA graph.

A captured graph replays a few thousand kernels with one launch, so the host no longer limits the
speed. A graph reads and writes fixed memory: inputs are copied to static tensors, and gradients are
written to static tensors. Communication and the fp32 sums of gradients follow the replay.
Megatron-LM captures forward and backward in the same way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from blip_scale.engine.zero.engine import ZeroEngine

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 3
"""Number of eager micro-steps before the first capture. They load kernels, select matrix
multiplication algorithms and compile."""
MAX_GRAPHS = 16
"""Maximum number of graphs, one for each set of input shapes. Further shapes run eager."""

Replay = Callable[[], None]


@dataclass(frozen=True)
class MicroStepOutputs:
    """Outputs of a network in a training step, detached."""

    names: tuple[str, ...]
    scalars: Tensor
    """[len(names)] fp32: losses and metrics."""
    tensors: dict[str, Tensor]
    """Outputs with at least one dimension."""

    @classmethod
    def of(cls, outputs: dict[str, Tensor]) -> MicroStepOutputs:
        """Separate scalars from tensors. Stack the scalars, so that one read returns all."""
        scalars = {name: value for name, value in outputs.items() if value.dim() == 0}
        tensors = {n: value.detach() for n, value in outputs.items() if n not in scalars}
        stacked = torch.stack([value.detach().float() for value in scalars.values()])
        return cls(tuple(scalars), stacked, tensors)

    def clone(self) -> MicroStepOutputs:
        """Return a copy that the next replay does not overwrite."""
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        return replace(self, scalars=self.scalars.clone(), tensors=tensors)


class Capturable(NamedTuple):
    """Results of forward and backward, in static memory once captured."""

    outputs: MicroStepOutputs
    gradients: list[Tensor]
    """Gradients from `ZeroEngine.compute_gradients`."""


Capture = Callable[[Callable[[], Capturable], Sequence[torch.Generator]], tuple[Replay, Capturable]]
"""Function that captures a function without arguments, which may use the given generators and
torch's default ones. It returns the replay, and the results that every replay overwrites."""


class EagerMicroStep:
    """Run forward and backward eagerly: the host launches each kernel."""

    def __init__(self, engine: ZeroEngine) -> None:
        self._engine = engine

    def __call__(self, inputs: tuple[Any, ...], is_last: bool) -> MicroStepOutputs:
        """Add the gradients of a micro-batch to the engine's.

        Args:
            inputs: arguments of the network.
            is_last: whether the optimizer step follows.
        """
        outputs = self._engine.forward(*inputs)
        self._engine.backward(outputs["loss/total"], is_last)
        return MicroStepOutputs.of(outputs)


@dataclass
class _Captured:
    """A captured graph and its static tensors."""

    inputs: list[Tensor]
    is_state: list[bool]
    """Whether each input stays in the same memory between steps. The graph reads such inputs in
    place."""
    results: Capturable
    replay: Replay

    def holds_state_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the inputs that are state are the tensors that were captured."""
        pairs = zip(self.inputs, tensors, self.is_state, strict=True)
        return all(static is new for static, new, is_state in pairs if is_state)

    def copy_inputs(self, tensors: Sequence[Tensor]) -> None:
        """Copy new inputs to the static tensors that the graph reads."""
        for static, new, is_state in zip(self.inputs, tensors, self.is_state, strict=True):
            if not is_state:
                static.copy_(new, non_blocking=True)


class CapturedMicroStep:
    """Forward and backward as one CUDA graph for each set of input shapes.

    The first steps, shapes seen for the first time, and shapes beyond `MAX_GRAPHS` run eagerly. The
    results equal those of the eager step, because a replay uses the same seeds.
    """

    def __init__(self, engine: ZeroEngine, capture: Capture, must_capture: bool = False) -> None:
        """Prepare to capture; nothing is captured yet.

        Args:
            engine: an engine whose `capture_obstacle` is None.
            capture: result of `cuda_graph`, or another function with its interface.
            must_capture: whether a failed capture raises. Otherwise it is logged as a warning, and
                the run goes on with eager steps.
        """
        self._engine, self._capture, self._must_capture = engine, capture, must_capture
        self._is_off = False
        self._eager = EagerMicroStep(engine)
        self._graphs: dict[Any, _Captured] = {}
        self._steps = 0
        self._seen: list[Tensor] = []
        """Input tensors of the previous step. A tensor that is passed again is state."""
        self._once: set[Any] = set()
        """Signatures of inputs that were seen before."""

    def __call__(self, inputs: tuple[Any, ...], is_last: bool) -> MicroStepOutputs:
        """See `EagerMicroStep`."""
        self._steps += 1
        tensors = tensors_in(inputs)
        before, self._seen = self._seen, tensors
        if self._is_off or self._steps <= WARM_UP_STEPS:
            return self._eager(inputs, is_last)
        key = signature(inputs)
        graph = self._graphs.get(key)
        if graph is None or not graph.holds_state_of(tensors):
            if not self._is_worth_a_graph(key):
                return self._eager(inputs, is_last)
            repeated = {id(tensor) for tensor in before}
            try:
                graph = self._captured(inputs, [id(tensor) in repeated for tensor in tensors])
            except RuntimeError as error:
                if self._must_capture:
                    raise
                reason = str(error).splitlines()[0]
                logger.warning("a CUDA graph can't be captured, steps run eagerly: %s", reason)
                self._is_off = True
                return self._eager(inputs, is_last)
            self._graphs[key] = graph
            logger.info("micro-step %d: captured CUDA graph %d", self._steps, len(self._graphs))
        self._engine.gather_weights()
        graph.copy_inputs(tensors)
        graph.replay()
        self._engine.add_gradients(graph.results.gradients, is_last)
        return graph.results.outputs.clone()

    def _is_worth_a_graph(self, key: Any) -> bool:
        """Whether inputs of this signature were seen before and there is room for a graph."""
        if key in self._once:
            return key in self._graphs or len(self._graphs) < MAX_GRAPHS
        self._once.add(key)
        return False

    def _captured(self, inputs: tuple[Any, ...], is_state: list[bool]) -> _Captured:
        state = iter(is_state)
        static_inputs = map_tensors(inputs, lambda x: x if next(state) else x.clone())

        def micro_step() -> Capturable:
            outputs = self._engine.forward(*static_inputs)
            gradients = self._engine.compute_gradients(outputs["loss/total"])
            return Capturable(MicroStepOutputs.of(outputs), gradients)

        self._engine.gather_weights()
        generators = [value for value in inputs if isinstance(value, torch.Generator)]
        replay, results = self._capture(micro_step, generators)
        return _Captured(tensors_in(static_inputs), is_state, results, replay)


def choose_micro_step(
    engine: ZeroEngine, setting: bool | Literal["auto"], task_obstacle: str | None
) -> EagerMicroStep | CapturedMicroStep:
    """Choose eager or captured micro-steps by `model.cuda_graph`, and log the choice.

    Raises:
        ValueError: the setting demands graphs, but they can't be captured.
    """
    obstacle = engine.capture_obstacle or task_obstacle
    if engine.device.type != "cuda":
        obstacle = f"CUDA graphs run on CUDA devices, not on {engine.device.type}"
    if setting is False:
        obstacle = "model.cuda_graph is false"
    elif setting is True and obstacle:
        raise ValueError(f"model.cuda_graph: true, but {obstacle}; set it to auto or false")
    if obstacle:
        is_expected = setting is False or engine.device.type == "cpu"
        level = logging.DEBUG if is_expected else logging.INFO
        logger.log(level, "micro-steps run eagerly: %s", obstacle)
        return EagerMicroStep(engine)
    logger.info("micro-steps run as CUDA graphs after %d eager ones", WARM_UP_STEPS)
    return CapturedMicroStep(engine, cuda_graph(), must_capture=setting is True)


def cuda_graph() -> Capture:
    """Return a `Capture` whose graphs share a memory pool, as only one runs at a time."""
    pool = torch.cuda.graph_pool_handle()

    def capture(
        function: Callable[[], Capturable], generators: Sequence[torch.Generator]
    ) -> tuple[Replay, Capturable]:
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        # thread_local allows the loader's threads to pin memory during the capture.
        with torch.cuda.graph(
            graph,
            pool=pool,
            stream=torch.cuda.current_stream(),
            capture_error_mode="thread_local",
        ):
            results = function()
        return graph.replay, results

    return capture


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Copy a structure of tuples and dataclasses, and apply `function` to every tensor.

    The order of the calls is fixed.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(map_tensors(item, function) for item in value)
    if isinstance(value, tuple):
        return type(value)(*(map_tensors(item, function) for item in value))
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value) if field.init]
        return replace(value, **{n: map_tensors(getattr(value, n), function) for n in names})
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of a structure, in the order of `map_tensors`."""
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    map_tensors(value, note)
    return tensors


def signature(value: Any) -> Any:
    """Return shapes, dtypes and host values. Structures with equal signatures share a graph."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype)
    if isinstance(value, tuple):
        return tuple(signature(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return tuple(signature(getattr(value, f.name)) for f in fields(value) if f.init)
    if isinstance(value, torch.Generator):
        return id(value)
    return value

"""Ranks of one point of `tools/benchmark.py growth`, each in its own process."""

from __future__ import annotations

import os
import resource
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from blip_scale import launcher
from blip_scale.config import checks
from blip_scale.model.flops import pretraining_flops
from tools.benchmarks.contest import DIED, ContenderError, Contest, Failure
from tools.benchmarks.step_contenders import KINDS, Contender, Match, Ours, serve


class GrowthContest(Contest):
    """All ranks of a point, which get the same requests."""

    def __init__(self, match: Match, ranks: int) -> None:
        super().__init__()
        port = launcher.free_port()
        self._pipes = [self.start(_serve_rank, rank, ranks, port, match) for rank in range(ranks)]
        self.ask("ready")
        self.ask("warm_up")

    def ask(self, what: str) -> list[Any]:
        """Send a request to all ranks and return their answers.

        Raises:
            ContenderError: a rank failed or died.
        """
        try:
            for pipe in self._pipes:
                pipe.send((what, ()))
            answers = [pipe.recv() for pipe in self._pipes]
        except (EOFError, OSError) as error:
            raise ContenderError("rank", DIED) from error
        for rank, answer in enumerate(answers):
            if isinstance(answer, Failure):
                raise ContenderError(f"rank {rank}", answer)
        return answers


def _serve_rank(pipe: Connection, rank: int, ranks: int, port: int, match: Match) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    KINDS["growing"] = Growing
    serve(pipe, Contender("growing", match))


class Growing(Ours):
    """Our step on one rank, with measured exchanges and theoretical cost."""

    def __init__(self, match: Match) -> None:
        self.match = match
        self.before_gib = _resident_peak_gib()
        super().__init__(match)

    def timed(self) -> dict[str, float]:
        """Seconds and exchanges of one step, which all ranks begin at the same time."""
        from blip_scale.engine import collectives

        collectives.barrier()
        began = time.perf_counter()
        self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - began
        metrics = self.run.meter.metrics()
        return {
            "seconds": seconds,
            "exchange_s": metrics["blocked_s"],
            "exchange_gb": metrics["communication/gigabytes_per_step"],
        }

    def memory(self) -> dict[str, float]:
        """Peak memory in GiB, and the peak before the network was built (0 on a GPU)."""
        from blip_scale.engine.watching.monitor import peak_memory_gib

        before = self.before_gib if self.device.type == "cpu" else 0.0
        return {"peak": peak_memory_gib(self.device), "before": before}

    def paper(self) -> dict[str, float]:
        """FLOPs and GiB of this rank by formula."""
        from blip_scale.engine import collectives
        from blip_scale.planning.activations import Micro, saved_activations, temporaries
        from blip_scale.planning.network import network_of
        from blip_scale.planning.states import Sharding, states
        from blip_scale.tasks.by_name import contrast_of

        chosen, ranks = self.recipe, collectives.world_size()
        batch, queue = chosen.train.global_batch_size // ranks, chosen.objective.queue_size
        tokens = len(self.batches[0].token_ids)
        network = network_of(chosen, contrast_of)
        size = self.task.dtype.itemsize
        ds_config = checks.resolve_deepspeed(chosen, self.match.ds_config, ranks)
        held = states(network, Sharding.of(ds_config, ranks, size))
        micro = Micro(batch, tokens, size, batch + queue, self.device.type == "cpu")
        running = [held.backward, temporaries(network.config, network.vision, micro)]
        running.append(
            saved_activations(
                network.config, network.vision, micro, chosen.model.gradient_checkpointing
            )
        )
        peak_bytes = max(sum(sum(part.values()) for part in running), sum(held.update.values()))
        return {
            "flops": pretraining_flops(self.task.config, batch, tokens, queue),
            "gib": (sum(held.resting.values()) + peak_bytes) / 2**30,
        }


def _resident_peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB

"""compression=auto: which compressor makes the step shortest here, by what was measured before the first one."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Protocol

from common.agreement import Runtime
from common.composition import option
from common.config import AutoCompressionConfig, CompressionConfig, RunConfig
from common.topology import Topology

from omegaconf import OmegaConf

REPEATS = 5
PROBE_VALUES = 1_000_000  # of the allreduce that the bandwidth is taken from


@dataclass(frozen=True)
class Estimate:
    """What a method would take.

    Attributes:
        method: its name.
        exchange_seconds: coding and sending one step's gradients, by the clock.
        wire_bytes: that a rank sends in a step.
    """

    method: str
    exchange_seconds: float
    wire_bytes: float


class Measure(Protocol):
    """What a binding's auto module measures, each on this rank."""

    def compute_seconds(self) -> float:
        """Forward and backward of one step."""

    def estimate(self, method: str) -> Estimate:
        """Exchanging a step's gradients with a method."""

    def allreduce_seconds(self, num_values: int) -> float:
        """Summing so many float32 values over the ranks."""


def choose(cfg: RunConfig, measure: Measure, runtime: Runtime, topology: Topology) -> CompressionConfig:
    """The configured compression, or in its place what auto finds best; rank 0 prints why.

    A run that goes on in its folder has what it had chosen before.

    Args:
        cfg: the configuration, with run.dir set.
        measure: how to measure.
        runtime: how ranks agree.
        topology: rank 0 reads and prints.
    """
    auto = cfg.compression
    if not isinstance(auto, AutoCompressionConfig):
        return auto
    path = Path(str(cfg.run.dir), "config.yaml")
    name = runtime.from_rank_zero(str(OmegaConf.load(path).compression.name) if path.exists() else None)
    if name is None:
        # Rank 0's clock decides, so that all choose alike.
        compute = runtime.from_rank_zero(measure.compute_seconds())
        estimates = [Estimate(**runtime.from_rank_zero(asdict(measure.estimate(name)))) for name in auto.candidates]
        latency, probe = (runtime.from_rank_zero(measure.allreduce_seconds(size)) for size in (1, PROBE_VALUES))
        if topology.rank == 0:
            print(report(estimates, compute, latency, probe, auto.min_gain), flush=True)
        name = best(estimates, compute, auto.min_gain).method
    chosen: CompressionConfig = option("compression", name)
    return chosen


def best(estimates: Sequence[Estimate], compute_seconds: float, min_gain: float) -> Estimate:
    """The first estimate, or a later one whose step is shorter than the best one's so far by the share min_gain."""
    best_one = estimates[0]
    for estimate in estimates[1:]:
        step, shortest = (compute_seconds + one.exchange_seconds for one in (estimate, best_one))
        if step < (1 - min_gain) * shortest:
            best_one = estimate
    return best_one


def median_seconds(action: Callable[[], object]) -> float:
    """The median time of some calls, after one that does not count."""
    action()
    seconds = []
    for _ in range(REPEATS):
        start = perf_counter()
        action()
        seconds.append(perf_counter() - start)
    return statistics.median(seconds)


def report(
    estimates: Sequence[Estimate], compute_seconds: float, latency: float, probe_seconds: float, min_gain: float
) -> str:
    """What was measured, which method was chosen, and why.

    Args:
        estimates: of all candidates.
        compute_seconds: forward and backward of one step.
        latency: seconds of an allreduce of one value.
        probe_seconds: of one of PROBE_VALUES.
        min_gain: see best().
    """
    chosen_one = best(estimates, compute_seconds, min_gain)
    megabytes = 4e-6 * PROBE_VALUES / max(probe_seconds - latency, 1e-9)
    lines = [
        f"compression=auto: latency {1e3 * latency:.2f} ms, {megabytes:,.0f} MB/s; a step's forward and backward "
        f"{1e3 * compute_seconds:.1f} ms"
    ]
    for one in estimates:
        step = compute_seconds + one.exchange_seconds
        lines.append(f"  {one.method:10} step {1e3 * step:8.1f} ms, {one.wire_bytes:13,.0f} bytes of a rank")
    first = estimates[0]
    gain = 1 - (compute_seconds + chosen_one.exchange_seconds) / (compute_seconds + first.exchange_seconds)
    why = (
        f"no other saves {min_gain:.0%} of the step" if chosen_one is first else f"saves {gain:.0%} of {first.method}'s"
    )
    return "\n".join([*lines, f"compression={chosen_one.method}: {why}"])

"""compression=auto: chooses the compressor with the shortest step, measured before the first step."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from common.config.composition import option
from common.config.schema import AutoCompressionConfig, CompressionConfig, RunConfig
from common.distributed.consensus import Runtime
from common.distributed.topology import Topology

from omegaconf import OmegaConf

PROBE_VALUES = 1_000_000  # size of the allreduce that measures the bandwidth


@dataclass(frozen=True)
class Estimate:
    """The measured cost of a compression method.

    Attributes:
        method: the name of the method.
        exchange_seconds: wall time to encode and exchange one step's gradients.
        wire_bytes: bytes that a rank sends in a step.
    """

    method: str
    exchange_seconds: float
    wire_bytes: float


class Measure(Protocol):
    """The measurements of a framework's autotune module, each taken on this rank."""

    def compute_seconds(self) -> float:
        """The seconds of one step's forward and backward."""

    def estimate(self, method: str) -> Estimate:
        """The cost of exchanging one step's gradients with a method."""

    def allreduce_seconds(self, num_values: int) -> float:
        """The seconds of an allreduce of num_values float32 values."""


def choose(cfg: RunConfig, measure: Measure, runtime: Runtime, topology: Topology) -> CompressionConfig:
    """Returns the configured compression; for auto, the best one by measurement, and rank 0 prints why.

    A run that resumes in its folder keeps its earlier choice.

    Args:
        cfg: the configuration, with run.dir set.
        measure: the framework's measurements.
        runtime: the framework's runtime; it broadcasts rank 0's values.
        topology: the place of this rank; rank 0 reads the earlier choice and prints.
    """
    auto = cfg.compression
    if not isinstance(auto, AutoCompressionConfig):
        return auto
    path = Path(str(cfg.run.dir), "config.yaml")
    name = runtime.broadcast_object(str(OmegaConf.load(path).compression.name) if path.exists() else None)
    if name is None:
        # Rank 0's measurements decide, so that all ranks choose the same method.
        compute = runtime.broadcast_object(measure.compute_seconds())
        estimates = [Estimate(**runtime.broadcast_object(asdict(measure.estimate(name)))) for name in auto.candidates]
        latency, probe = (runtime.broadcast_object(measure.allreduce_seconds(size)) for size in (1, PROBE_VALUES))
        if topology.rank == 0:
            print(report(estimates, compute, latency, probe, auto.min_gain), flush=True)
        name = best(estimates, compute, auto.min_gain).method
    chosen: CompressionConfig = option("compression", name)
    return chosen


def best(estimates: Sequence[Estimate], compute_seconds: float, min_gain: float) -> Estimate:
    """The first estimate, or a later one if it shortens the best step so far by more than the fraction min_gain."""
    best_one = estimates[0]
    for estimate in estimates[1:]:
        step, shortest = (compute_seconds + one.exchange_seconds for one in (estimate, best_one))
        if step < (1 - min_gain) * shortest:
            best_one = estimate
    return best_one


def report(
    estimates: Sequence[Estimate], compute_seconds: float, latency: float, probe_seconds: float, min_gain: float
) -> str:
    """The text about the measurements, the chosen method, and the reason.

    Args:
        estimates: the estimates of all candidates.
        compute_seconds: the seconds of one step's forward and backward.
        latency: the seconds of an allreduce of one value.
        probe_seconds: the seconds of an allreduce of PROBE_VALUES values.
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

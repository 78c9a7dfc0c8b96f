"""compression=auto: which compressor makes the step shortest here, by what was measured before the first one."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from common.config import RunConfig

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


def earlier(cfg: RunConfig) -> str | None:
    """The method that an interrupted run in the same folder had chosen."""
    path = Path(str(cfg.run.dir), "config.yaml")
    return str(OmegaConf.load(path).compression.name) if path.exists() else None


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

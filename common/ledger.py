"""Which rank used which example at which step: one file per rank and launch below <run.dir>/ledger."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.config import ConfigError
from common.sharding import Plan, Step


class Ledger:
    """What one rank writes down.

    Args:
        folder: of the run.
        plan: the run's steps as this rank sees them.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        start, rank = plan.start.step, plan.topology.rank
        self._path = folder / "ledger" / f"from-step-{start + 1:08}.rank-{rank:04}.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("")
        self._num_examples = plan.num_examples
        self._write({"num_examples": plan.num_examples, "resampled": plan.classes is not None})

    def add(self, step: Step) -> None:
        """Notes the examples of this rank's step."""
        used = step.end.offset or self._num_examples
        self._write({"step": step.number, "epoch": step.epoch, "used": used, "examples": step.examples.tolist()})

    def _write(self, line: dict[str, object]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def drop(folder: Path, start: int) -> None:
    """Removes what launches noted that began after this step; the run is about to redo it."""
    for path in (folder / "ledger").glob("from-step-*.jsonl"):
        if _first_step(path) > start:
            path.unlink()


def check(folder: Path) -> Iterator[tuple[bool, str]]:
    """Per epoch, whether its examples were used as they should be, and a line that says so.

    Raises:
        ConfigError: the run has no ledger, or it is damaged.
    """
    paths = sorted((folder / "ledger").glob("from-step-*.jsonl"))
    if not paths:
        raise ConfigError([f"run.dir={folder}: has no ledger; train with data.ledger=true"])
    firsts = sorted({_first_step(path) for path in paths})
    epochs: defaultdict[int, Counter[int]] = defaultdict(Counter)
    wanted: defaultdict[int, int] = defaultdict(int)  # per epoch, how many examples its steps so far were to use
    for path in paths:
        # A launch that resumed redid the steps from its first one on: what was noted of them before was undone.
        redone = min((first for first in firsts if first > _first_step(path)), default=math.inf)
        header, *steps = _lines(path)
        for step in steps:
            if step["step"] < redone:
                epochs[step["epoch"]].update(step["examples"])
                wanted[step["epoch"]] = max(wanted[step["epoch"]], step["used"])
    for epoch, used in sorted(epochs.items()):
        last = wanted[epoch] if epoch == max(epochs) else header["num_examples"]
        is_right, what = _judge(used, last, header["num_examples"], header["resampled"])
        yield is_right, f"epoch {epoch}: {what}"


def _first_step(path: Path) -> int:
    return int(path.name.partition(".")[0].removeprefix("from-step-"))


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file but for a last one that is cut off, as a killed run leaves it."""
    lines = path.read_text().splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise ConfigError([f"{path}: is damaged: {error}; train again with data.ledger=true"]) from error


def _judge(used: Counter[int], wanted: int, num_examples: int, resampled: bool) -> tuple[bool, str]:
    """Whether an epoch's examples are right, and what to say of them."""
    count = used.total()
    foreign = [example for example in used if not 0 <= example < num_examples]
    if foreign:
        return False, f"example {foreign[0]} is none of the {num_examples:,}"
    if resampled:
        return count == wanted, f"{count:,} of {num_examples:,} draws, with replacement"
    twice = [example for example, times in used.items() if times > 1]
    if twice:
        return False, f"{len(twice):,} of {num_examples:,} examples more than once, such as number {min(twice)}"
    said = f"{count:,} of {num_examples:,} examples, each once"
    if count < wanted:
        return False, f"{said}; {wanted - count:,} were lost"
    return True, said if wanted == num_examples else f"{said}; the run ended within the epoch"

"""Which rank used which example at which step: one file per rank and launch below <run.dir>/ledger."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import disk
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
        offset = plan.start.offset
        self._write({"num_examples": plan.num_examples, "resampled": plan.classes is not None, "offset": offset})

    def add(self, step: Step) -> None:
        """Notes the examples of this rank's step."""
        used = step.end.offset or self._num_examples
        self._write({"step": step.number, "epoch": step.epoch, "used": used, "examples": step.examples.tolist()})

    def _write(self, line: dict[str, object]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def drop(folder: Path, start: int) -> None:
    """Removes what launches noted that began after this step; the run is about to redo it."""
    for path in _paths(folder):
        if _first_step(path) > start:
            path.unlink()


@dataclass(frozen=True)
class _Launch:
    """What one rank noted at the beginning of one launch.

    Attributes:
        num_examples: size of the training set.
        resampled: whether an epoch's examples are drawn with replacement.
        offset: number of the examples of its first epoch that had been used before.
    """

    num_examples: int
    resampled: bool
    offset: int


def check(folder: Path) -> Iterator[tuple[bool, str]]:
    """Per epoch, whether its examples were used as they should be, and a line that says so.

    Raises:
        ConfigError: the run has no ledger, or it is damaged.
    """
    launches: list[_Launch] = []
    firsts = {path: _first_step(path) for path in _paths(folder)}
    epochs: defaultdict[int, Counter[int]] = defaultdict(Counter)
    wanted: defaultdict[int, int] = defaultdict(int)  # per epoch, how many examples its steps so far were to use
    for path, first_step in firsts.items():
        # A launch that resumed redid the steps from its first one on: what was noted of them before was undone.
        redone = min((first for first in firsts.values() if first > first_step), default=math.inf)
        launch, steps = _read(path)
        launches += [launch] if launch else []
        for step in steps:
            if step["step"] < redone:
                epochs[step["epoch"]].update(step["examples"])
                wanted[step["epoch"]] = max(wanted[step["epoch"]], step["used"])
    if not launches:
        raise ConfigError([f"run.dir={folder}: has no ledger; train with data.ledger=true"])
    before = launches[0].offset  # files are in the order of their first steps
    for epoch, used in sorted(epochs.items()):
        is_right, what = _judge(used, wanted[epoch], epoch < max(epochs), before, launches[-1])
        yield is_right, f"epoch {epoch}: {what}"
        before = 0


def _paths(folder: Path) -> list[Path]:
    return sorted((folder / "ledger").glob("from-step-*.jsonl"))


def _first_step(path: Path) -> int:
    number = path.name.partition(".")[0].removeprefix("from-step-")
    if not (number.isascii() and number.isdecimal()):
        raise ConfigError([f"{path}: is no file of a ledger; take it out of the folder"])
    return int(number)


def _read(path: Path) -> tuple[_Launch | None, list[dict[str, Any]]]:
    """A file's first line and its steps, but for a last line that is cut off, as a killed run leaves it.

    Raises:
        ConfigError: they are not what Ledger writes.
    """
    try:
        lines = disk.read_bytes(path).splitlines(keepends=True)
        values = [disk.parse_json(line) for line in lines if line.endswith(b"\n")]
        if not values:
            return None, []
        header, *steps = values
        if not _is_header(header) or not all(map(_is_step, steps)):
            raise ValueError("a line is not what a run notes")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else disk.brief(error)
        raise ConfigError([f"{path}: is damaged: {reason}; train again with data.ledger=true"]) from error
    return _Launch(header["num_examples"], header["resampled"], header.get("offset", 0)), steps


def _is_header(line: Any) -> bool:
    return (
        isinstance(line, dict)
        and _are_counts(line.get("num_examples"), line.get("offset", 0))  # earlier versions note no offset
        and isinstance(line.get("resampled"), bool)
    )


def _is_step(line: Any) -> bool:
    return (
        isinstance(line, dict)
        and _are_counts(*(line.get(key) for key in ("step", "epoch", "used")))
        and isinstance(line.get("examples"), list)
        and all(type(example) is int for example in line["examples"])
    )


def _are_counts(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 53 for value in values)


def _judge(used: Counter[int], noted: int, is_over: bool, before: int, launch: _Launch) -> tuple[bool, str]:
    """Whether an epoch's examples are right, and what to say of them.

    Args:
        used: how often each was noted.
        noted: how far the epoch has come, by what was noted.
        is_over: whether another epoch follows, so that it has come to its end.
        before: how many of its examples were used before the first launch of the ledger.
        launch: the last one.
    """
    num_examples, count = launch.num_examples, used.total()
    foreign = [example for example in used if not 0 <= example < num_examples]
    if foreign:
        return False, f"example {disk.brief(foreign[0])} is none of the {num_examples:,}"
    wanted = (num_examples if is_over else noted) - before
    by_others = f"; {before:,} were used by the run it was resumed from" if before else ""
    if launch.resampled:
        return count == wanted, f"{count:,} of {num_examples:,} draws, with replacement{by_others}"
    twice = [example for example, times in used.items() if times > 1]
    if twice:
        return False, f"{len(twice):,} of {num_examples:,} examples more than once, such as number {min(twice)}"
    said = f"{count:,} of {num_examples:,} examples, each once{by_others}"
    if count < wanted:
        return False, f"{said}; {wanted - count:,} were lost"
    return True, said if wanted + before == num_examples else f"{said}; the run ended within the epoch"

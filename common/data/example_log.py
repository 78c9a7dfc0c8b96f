"""Which rank used which example at which step: one file per rank and launch below <run.dir>/ledger."""

import json
import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import file_io
from common.data.sampler import Step, TrainingSampler
from common.errors import ConfigError


class Ledger:
    """Writes one rank's ledger.

    Args:
        folder: the run folder.
        sampler: this rank's sampler of the run's steps.
    """

    def __init__(self, folder: Path, sampler: TrainingSampler) -> None:
        start, rank = sampler.start.step, sampler.topology.rank
        path = path_of(folder, start, rank)
        file_io.make_folder(path.parent)
        # It stays open: what a rank of an earlier job still writes is then in a file that drop() has removed.
        self._file = path.open("w", buffering=1)
        weakref.finalize(self, self._file.close)
        file_io.sync_path(path.parent)
        self._num_examples = sampler.num_examples
        offset = sampler.start.offset
        self._write({"num_examples": sampler.num_examples, "resampled": sampler.classes is not None, "offset": offset})

    def add(self, step: Step) -> None:
        """Writes the numbers of this rank's examples in a step."""
        used = step.end.offset or self._num_examples
        self._write({"step": step.number, "epoch": step.epoch, "used": used, "examples": step.examples.tolist()})

    def _write(self, line: dict[str, object]) -> None:
        self._file.write(json.dumps(line) + "\n")


def path_of(folder: Path, start: int, rank: int) -> Path:
    """The ledger of a rank, of the launch that begins after step `start`."""
    return folder / "ledger" / f"from-step-{start + 1:08}.rank-{rank:04}.jsonl"


def drop(folder: Path, start: int) -> None:
    """Removes the files of launches that began after step `start`; the run repeats these steps."""
    later = [path for path in _paths(folder) if _first_step(path) > start]
    for path in later:
        path.unlink()
    if later:
        file_io.sync_path(folder / "ledger")


@dataclass(frozen=True)
class _Launch:
    """The first line of a ledger file, which describes one launch.

    Attributes:
        num_examples: size of the training set.
        resampled: whether an epoch's examples are drawn with replacement.
        offset: number of examples of the launch's first epoch that were used before it.
    """

    num_examples: int
    resampled: bool
    offset: int


def check(folder: Path) -> Iterator[tuple[bool, str]]:
    """For each epoch, yields whether its examples were used correctly, and a line of text about it.

    Raises:
        ConfigError: the run has no ledger, or the ledger is damaged.
    """
    launches: list[_Launch] = []
    firsts = {path: _first_step(path) for path in _paths(folder)}
    epochs: defaultdict[int, Counter[int]] = defaultdict(Counter)
    wanted: defaultdict[int, int] = defaultdict(int)  # per epoch, how many examples its steps so far should use
    for path, first_step in firsts.items():
        # A resumed launch repeats the steps from its first one on: earlier records of these steps do not count.
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
    """A file's first line and its steps; an incomplete last line, as a killed run leaves it, is ignored.

    Raises:
        ConfigError: a line does not have the form that Ledger writes.
    """
    try:
        lines = file_io.read_bytes(path).splitlines(keepends=True)
        values = [file_io.parse_json(line) for line in lines if line.endswith(b"\n")]
        if not values:
            return None, []
        header, *steps = values
        if not _is_header(header) or not all(map(_is_step, steps)):
            raise ValueError("a line is not what a run notes")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else file_io.brief(error)
        raise ConfigError([f"{path}: is damaged: {reason}; train again with data.ledger=true"]) from error
    return _Launch(header["num_examples"], header["resampled"], header.get("offset", 0)), steps


def _is_header(line: Any) -> bool:
    return (
        isinstance(line, dict)
        and _are_counts(line.get("num_examples"), line.get("offset", 0))  # earlier versions wrote no offset
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
    """Whether an epoch's examples are correct, and a text that says so.

    Args:
        used: how often each example was recorded.
        noted: number of the epoch's examples that should be used by its last recorded step.
        is_over: whether the epoch is complete, as another epoch follows.
        before: number of the epoch's examples that were used before the first launch of the ledger.
        launch: the last launch.
    """
    num_examples, count = launch.num_examples, used.total()
    foreign = [example for example in used if not 0 <= example < num_examples]
    if foreign:
        return False, f"example {file_io.brief(foreign[0])} is none of the {num_examples:,}"
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

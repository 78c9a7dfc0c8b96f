"""The events of a run in metrics.jsonl: one JSON object per line, with step, epoch and values."""

import json
import sys
from pathlib import Path
from typing import Any

from common import file_io

NOT_VALUES = ("step", "epoch", "wall_seconds")  # keys of an event that are not logged values


def append(path: Path, event: dict[str, Any]) -> None:
    """Adds an event."""
    with path.open("a") as file:
        file.write(json.dumps(event) + "\n")


def continue_from(path: Path, start: int) -> list[dict[str, Any]]:
    """Removes the events after the step `start`, from which a run begins; returns those before it.

    A file with invalid lines is renamed; the new one begins with its valid events.
    """
    events: list[dict[str, Any]] = []
    if start and path.exists():
        events, problems = read(path)
        if problems:
            aside = file_io.unused(path.with_name("metrics.damaged.jsonl"))
            path.rename(aside)
            print(f"{path}: is damaged, and kept as {aside.name}: {problems[0]}", file=sys.stderr, flush=True)
    events = [event for event in events if event["step"] <= start]
    file_io.replace(path, "".join(json.dumps(event) + "\n" for event in events))
    return events


def read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The events in a metrics.jsonl, and the problems of its invalid lines.

    A last line without an end, as a killed run leaves it, is ignored.
    """
    try:
        lines = file_io.read_bytes(path).splitlines(keepends=True)
    except OSError as error:
        return [], [str(error.strerror)]
    events, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            continue
        try:
            event = file_io.parse_json(line)
        except ValueError as error:
            problems.append(f"line {number} is not JSON ({file_io.brief(error)})")
            continue
        if _is_event(event):
            events.append(event)
        else:
            problems.append(f"line {number} is no event of a run")
    return events, problems


def _is_event(event: Any) -> bool:
    """Whether it is a dict with a step and an epoch, whose values are all numbers and whose names are ASCII."""
    return (
        isinstance(event, dict)
        and all(type(event.get(name)) is int and 0 <= event[name] < 2**53 for name in ("step", "epoch"))
        and all(type(value) in (int, float) and abs(value) < 1e300 for value in event.values())
        and all(name.isascii() for name in event)
    )

"""The files of a checkpoint, in a format that does not depend on the framework.

A checkpoint is a folder <run.dir>/checkpoints/step-<number> with the arrays as safetensors and the rest as JSON. It is
written into a temporary folder, hashed and then renamed, so that a folder with the final name is complete. Arrays have
PyTorch's names and layouts (common/tf/training/checkpoint.py converts them), so that one framework can resume from a
checkpoint of the other.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import file_io
from common.distributed.array_exchange import Arrays
from common.errors import ConfigError

WEIGHTS, OPTIMIZER, GRADIENTS = "weights.safetensors", "optimizer.safetensors", "gradients.safetensors"
STATE = "state.json"
MEMORY = Path("memory")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read.

    Attributes:
        folder: the folder of the checkpoint; MEMORY if it is in memory.
        weights: the weights, by name.
        optimizer_state: the optimizer's state, by name.
        gradients: the state of compressors and the loss scale, by name.
        state: the rest: task, position, batch_sizes, config, fingerprint, versions, and the extras of the task.
    """

    folder: Path
    weights: Arrays
    optimizer_state: Arrays
    gradients: Arrays
    state: dict[str, Any]


def write(folder: Path, weights: Arrays, optimizer_state: Arrays, gradients: Arrays, state: dict[str, Any]) -> None:
    """Writes a checkpoint into a folder, which must not exist; it appears when everything is on the disk."""
    for leftover in folder.parent.glob(".*.unfinished"):
        shutil.rmtree(leftover)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    file_io.make_folder(folder.parent)
    unfinished.mkdir()
    files = {WEIGHTS: weights, OPTIMIZER: optimizer_state, GRADIENTS: gradients}
    hashes = {name: _write_arrays(unfinished / name, arrays) for name, arrays in files.items()}
    hashes[STATE] = state_sha256(state)
    with (unfinished / STATE).open("wb") as file:
        file.write(json.dumps(state | {"sha256": hashes}, indent=2).encode())
        file_io.sync(file)
    file_io.sync_path(unfinished)
    unfinished.rename(folder)
    file_io.sync_path(folder.parent)


def _write_arrays(path: Path, arrays: Arrays) -> str:
    """Writes a file of arrays without another copy of all of them in memory; returns its SHA-256."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(dict(arrays), path)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error
    with path.open("rb+") as file:
        file_io.sync(file)
        return file_io.sha256(file)


def state_sha256(state: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal, of a checkpoint's state without its hashes."""
    others = {key: value for key, value in state.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def read(folder: Path) -> Checkpoint:
    """Reads a checkpoint; checks that it is complete and that its state has the required keys.

    Raises:
        ConfigError: the checkpoint is not sound; the message names the folder.
    """
    from safetensors.numpy import load

    try:
        state = _understood(STATE, file_io.parse_json, file_io.read_bytes(folder / STATE))
        _check_state(state)
        contents = {name: file_io.read_bytes(folder / name) for name in (WEIGHTS, OPTIMIZER, GRADIENTS)}
        _check_hashes(state, contents)
        weights, optimizer_state, gradients = (_understood(name, load, content) for name, content in contents.items())
        if any(array.dtype.kind != "f" for array in weights.values()):
            raise ValueError(f"{WEIGHTS} has numbers that are no floating-point ones")
        return Checkpoint(folder, weights, optimizer_state, gradients, state)
    except OSError as error:
        reason = f"{Path(str(error.filename)).name} cannot be read ({error.strerror})"
        raise ConfigError([f"{folder}: is no sound checkpoint: {reason}"]) from error
    except ValueError as error:
        raise ConfigError([f"{folder}: is no sound checkpoint: {error}"]) from error


def _understood(name: str, parse: Callable[[bytes], Any], content: bytes) -> Any:
    """The parsed contents of a file; raises a ValueError with its name if the format is wrong."""
    from safetensors import SafetensorError

    try:
        return parse(content)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{name} cannot be understood: {file_io.brief(error)}") from error


def _check_hashes(state: Mapping[str, Any], contents: Mapping[str, bytes]) -> None:
    """Raises a ValueError if a file was changed after it was written; older checkpoints have no hash of the state."""
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    if STATE in state["sha256"]:
        hashes[STATE] = state_sha256(state)
    for name, found in hashes.items():
        if state["sha256"].get(name) != found:
            raise ValueError(f"{name} was cut off or altered: its SHA-256 is not that of {STATE}")


# The required keys of a state, and their types.
_STATE_TYPES: dict[str, type] = {
    **dict.fromkeys(("task", "framework", "fingerprint"), str),
    **dict.fromkeys(("config", "position", "batch_sizes", "sha256"), dict),
}
_LEAST_POSITION = {"step": 0, "epoch": 1, "offset": 0}
_MOST = 1 << 53  # limit of counters: smaller integers are exact as float64, too


def _check_state(state: Any) -> None:
    """Raises a ValueError if a state does not have the form that Checkpoints writes."""
    if not isinstance(state, dict):
        raise ValueError(f"{STATE} is no JSON object")
    wrong = [key for key, kind in _STATE_TYPES.items() if not isinstance(state.get(key), kind)]
    if not wrong:
        optimizer = state["config"].get("optimizer")
        is_right = {
            "config": isinstance(optimizer, dict) and isinstance(optimizer.get("name"), str),
            "position": _is_position(state["position"]),
            "batch_sizes": _are_batch_sizes(state["batch_sizes"]),
        }
        wrong = [key for key, right in is_right.items() if not right]
    if wrong:
        raise ValueError(f"{STATE} lacks {' and '.join(map(repr, wrong))}, or has it in another form")


def _is_position(position: Mapping[str, Any]) -> bool:
    return position.keys() == _LEAST_POSITION.keys() and all(
        _is_count(position[key], least) for key, least in _LEAST_POSITION.items()
    )


def _are_batch_sizes(sizes: Mapping[str, Any]) -> bool:
    """Whether they have the form of BatchSizes.to_json()."""
    changes, numbers = sizes.get("changes"), (sizes.get("noise"), sizes.get("signal"))
    return (
        isinstance(changes, list)
        and bool(changes)
        and all(isinstance(change, list) and len(change) == 2 for change in changes)
        and all(_is_count(number, 1) for change in changes for number in change)
        and changes[0][0] == 1
        and all(isinstance(number, int | float) and abs(number) < _MOST**2 for number in numbers)
    )


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < _MOST


def newest(run_folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest sound checkpoint of a run, and the problems of newer ones."""
    problems: list[str] = []
    for folder in reversed(saved(run_folder / "checkpoints")):
        try:
            return read(folder), problems
        except ConfigError as error:
            problems += error.problems
    return None, problems


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a folder, in the order of their steps."""
    return sorted((path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def last_step(folder: Path) -> int:
    """The step of the last checkpoint in a folder; 0 if there is none."""
    return max(map(_step, saved(folder)), default=0)


def set_aside(folder: Path, start: int) -> None:
    """Moves checkpoints of later steps than `start`, from which a run resumes, into the folder `abandoned`.

    They belong to another branch of the run, and would be mistaken for newer than the checkpoints to come.
    """
    later = [path for path in saved(folder) if _step(path) > start]
    if later:
        abandoned = folder / "abandoned"
        file_io.make_folder(abandoned)
        for path in later:
            path.rename(file_io.unused(abandoned / path.name))
        file_io.sync_path(folder)


def find(path: Path) -> Checkpoint:
    """The checkpoint at a path, or the newest sound checkpoint of the run at a path.

    Raises:
        ConfigError: there is no sound checkpoint.
    """
    if os.path.exists(path / STATE) or path.name.startswith("step-"):  # Path.exists() raises where names are too long
        return read(path)
    checkpoint, problems = newest(path)
    if checkpoint is None:
        raise ConfigError([f"{path}: has no sound checkpoint", *problems])
    return checkpoint

"""Runs scripts of tests/scripts/ and keeps their outcomes.

    python -m tests.helpers.script_job keras FOLDER                       the authors' versions, without this project
    horovodrun -np 2 python -m tests.helpers.script_job keras FOLDER      the distributed ones

A comment `# new` marks a line that was added to the author's version, `# was: ...` one that replaces another line.
"""

import os
import re
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def sources(framework: str) -> dict[str, str]:
    """The distributed versions by name, of scripts whose packages are installed."""
    texts = {path.stem: path.read_text() for path in sorted((SCRIPTS / framework).glob("*.py"))}
    return {name: text for name, text in texts.items() if all(map(find_spec, imported(text)))}


def imported(source: str) -> set[str]:
    """The packages that a script imports."""
    return set(re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE))


def changed_lines(source: str) -> int:
    """Number of lines that differ from the author's version."""
    return len(re.findall(r"  # (?:new|was: .*)$", source, re.MULTILINE))


def authors_version(source: str) -> str:
    """The script without what was changed in it."""
    lines = [re.sub(r"^(\s*).*  # was: (.*)", r"\1\2", line) for line in source.splitlines()]
    return "\n".join(line for line in lines if not line.endswith("  # new")) + "\n"


def _flat(value: Any) -> np.ndarray:
    if isinstance(value, list | tuple):
        return np.concatenate([np.zeros(0), *map(_flat, value)])
    if isinstance(value, dict):
        return _flat([value[name] for name in sorted(value)])
    return np.asarray(value, np.float64).ravel()


def main(framework: str, folder: str, *names: str) -> None:
    """Runs the scripts one after another; what they leave in `outcome` goes to FOLDER/<script>.<rank>.npz."""
    rank = os.environ.get("HOROVOD_RANK", "0")
    os.environ["SCRIPT_FOLDER"] = folder
    for name, source in sources(framework).items():
        if names and name not in names:
            continue
        text = source if "HOROVOD_RANK" in os.environ else authors_version(source)
        found: dict[str, Any] = {"__name__": "__main__"}
        try:
            exec(compile(text, name, "exec"), found)
        except Exception:
            traceback.print_exc()
            print(f"{name} failed", flush=True)
            continue
        values: dict[str, Any] = {key: _flat(value) for key, value in found["outcome"].items()}
        np.savez(Path(folder) / f"{name}.{rank}.npz", **values)
        if framework == "keras":
            found["keras"].backend.clear_session()


if __name__ == "__main__":
    main(*sys.argv[1:])

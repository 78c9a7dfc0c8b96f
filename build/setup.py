"""Makes the environment in .venv: pinned packages, and Horovod built for them. `make setup` calls this.

It does nothing when .venv was finished with the same options from the same files; an unfinished one is made anew.
Runs on the standard library alone, as nothing else is there yet.

    python3.11 build/setup.py [FRAMEWORKS=torch,tf] [ACCELERATOR=cpu|cuda] [WITH_MPI=0|1]

An option that is left out keeps the value that .venv was last made with.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STATE = VENV / "setup.json"
FILES = ("setup.py", "constraints.txt", "horovod/sdist.txt", "horovod/*.py", "horovod/edits/*.patch")
CHOICES = {
    "FRAMEWORKS": ("torch,tf", "torch", "tf"),
    "ACCELERATOR": ("cpu", "cuda"),
    "WITH_MPI": ("0", "1"),
}


def read_options(arguments: list[str], last: dict[str, str]) -> dict[str, str]:
    """The options of the command line, over those of the last time, over the defaults."""
    options = {name: choices[0] for name, choices in CHOICES.items()} | last
    for argument in arguments:
        name, _, value = argument.partition("=")
        if value not in CHOICES.get(name, ()):
            valid = " ".join(f"{name}={'|'.join(choices)}" for name, choices in CHOICES.items())
            sys.exit(f"{argument}: not an option of the setup; choose from {valid}")
        options[name] = value
    return options


def wanted_state(options: dict[str, str]) -> dict[str, object]:
    """Everything that decides what .venv holds."""
    import tomllib  # new in Python 3.11, and this file speaks to older ones, too

    files = sorted(path for pattern in FILES for path in (ROOT / "build").glob(pattern))
    return {
        "options": options,
        "python": sys.version,
        "root": str(ROOT),
        "project": tomllib.loads((ROOT / "pyproject.toml").read_text())["project"],
        "files": {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }


def last_state() -> dict[str, Any]:
    """What .venv was made for, or was being made for when the setup was interrupted."""
    try:
        state: dict[str, Any] = json.loads(STATE.read_text())
    except (OSError, ValueError):
        return {}
    return state


def check_machine() -> None:
    """Leaves with a message when something that pip cannot install is missing."""
    missing = []
    if not shutil.which(os.environ.get("CXX", "c++")):
        missing.append("a C++ compiler (Debian, Ubuntu: g++; Fedora, RHEL: gcc-c++; or set CXX)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        missing.append("Python's headers (Debian, Ubuntu: python3.11-dev; Fedora, RHEL: python3.11-devel)")
    if missing:
        sys.exit("Horovod is compiled here, and this machine lacks " + " and ".join(missing))


def run(*command: str | Path) -> str:
    """Runs a step of the setup and returns its stdout; leaves with the step's own message when it fails."""
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(f"make setup: this step failed: {' '.join(map(str, command))}\n{result.stdout}")
    return result.stdout


def pip_install(*arguments: str) -> None:
    """Installs into .venv within the pinned versions."""
    run(PYTHON, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-c", "build/constraints.txt", *arguments)


def main() -> None:
    """Command line entry."""
    if sys.version_info[:2] != (3, 11):
        sys.exit(f"The setup needs Python 3.11, not {sys.version.split()[0]}: make setup PYTHON=/path/to/python3.11")
    with (ROOT / "pyproject.toml").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second setup waits for the first, and finds its work done
        set_up(sys.argv[1:])


def set_up(arguments: list[str]) -> None:
    """Makes .venv what the options ask for, if it is not."""
    last = last_state()
    options = read_options(arguments, last.get("options", {}))
    state = wanted_state(options)
    if last == state:
        return
    check_machine()
    print(f"Setting up .venv ({' '.join(f'{name}={value}' for name, value in options.items())})", flush=True)
    # From scratch, so that neither an interrupted setup nor the packages of other options leave anything behind. The
    # interpreter is the one behind all links, as the one that runs this may be in .venv.
    python = Path(sys.executable).resolve()
    shutil.rmtree(VENV, ignore_errors=True)
    run(python, "-m", "venv", VENV)
    STATE.write_text(json.dumps({"options": options}))
    cuda, mpi = options["ACCELERATOR"] == "cuda", options["WITH_MPI"] == "1"
    frameworks = options["FRAMEWORKS"].split(",")
    extras = ["build", "dev", *(f"{name}-cuda" if cuda and name == "tf" else name for name in frameworks)]
    pip_install("setuptools", "wheel")
    pip_install("--no-build-isolation", "--editable", f".[{','.join([*extras, *['mpi'] * mpi])}]")
    wheel = run(PYTHON, "build/horovod/wheel.py", *["--mpi"] * mpi, *["--cuda"] * cuda).strip()
    pip_install("--no-deps", wheel)
    for framework in frameworks:
        run(PYTHON, "-c", f"import common.{framework}.runtime")
    unfinished = STATE.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(state, indent=2))
    unfinished.replace(STATE)
    print("Set up. Next: make train, or make help", flush=True)


if __name__ == "__main__":
    main()

"""Makes the environment in .venv: pinned packages, and Horovod built for them. `make setup` calls this.

It does nothing when .venv was finished with the same options from the same files; an unfinished one is made anew.
Runs on the standard library alone, as nothing else is there yet.

    python3.11 build/setup.py [FRAMEWORKS=torch,tf] [ACCELERATOR=cpu|cuda] [WITH_MPI=0|1]

An option that is left out keeps the value that .venv was last made with.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
FINISHED = VENV / "setup.json"
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


def check_machine() -> None:
    """Leaves with a message when something that pip cannot install is missing."""
    missing = []
    if sys.version_info[:2] != (3, 11):
        sys.exit(f"The setup needs Python 3.11, not {sys.version.split()[0]}: make setup PYTHON=/path/to/python3.11")
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
    finished = json.loads(FINISHED.read_text()) if FINISHED.exists() else {}
    options = read_options(sys.argv[1:], finished.get("options", {}))
    files = [path for path in (ROOT / "build").rglob("*") if path.is_file()]
    state = {
        "options": options,
        "project": tomllib.loads((ROOT / "pyproject.toml").read_text())["project"],
        "files": {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)},
    }
    if finished == state:
        return

    check_machine()
    cuda, mpi = options["ACCELERATOR"] == "cuda", options["WITH_MPI"] == "1"
    extras = ["build", "dev", *options["FRAMEWORKS"].split(",")] + ["mpi"] * mpi
    if cuda:
        extras = [extra.replace("tf", "tf-cuda") for extra in extras]
    FINISHED.unlink(missing_ok=True)
    print(f"Setting up .venv ({' '.join(f'{name}={value}' for name, value in options.items())})", flush=True)
    # From scratch, so that neither an interrupted setup nor the packages of other options leave anything behind.
    run(sys.executable, "-m", "venv", "--clear", VENV)
    pip_install("setuptools", "wheel")
    pip_install("--no-build-isolation", "--editable", f".[{','.join(extras)}]")
    wheel = run(PYTHON, "build/horovod/wheel.py", *["--mpi"] * mpi, *["--cuda"] * cuda).strip()
    pip_install("--no-deps", wheel)
    for framework in options["FRAMEWORKS"].split(","):
        run(PYTHON, "-c", f"import common.{framework}.runtime")
    FINISHED.write_text(json.dumps(state, indent=2))
    print("Set up. Next: make train, or make help", flush=True)


if __name__ == "__main__":
    main()

"""Makes the environment in .venv: pinned packages, and Horovod built for them. `make setup` calls this.

It does nothing when .venv was finished with the same options from the same files; an unfinished one is made anew.
Runs on the standard library alone, as nothing else is there yet.

    python3 install/setup.py [FRAMEWORKS=torch,tf] [ACCELERATOR=cpu|cuda] [WITH_MPI=0|1] [TORCH_INDEX=pip|URL|FOLDER]
                             [HOROVOD_WHEEL=build|FILE|URL]

An option that is left out keeps the value that .venv was last made with.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
PYTHONS = [(3, minor) for minor in (10, 11, 12, 13)]
LOCK = ROOT / "install" / "constraints.txt"
STATE = VENV / "setup.json"
FILES = (
    "setup.py",
    "constraints.txt",
    "horovod/sdist.txt",
    "horovod/README.md",
    "horovod/*.py",
    "horovod/edits/*.patch",
)
CHOICES = {
    "FRAMEWORKS": ("torch,tf", "torch", "tf"),
    "ACCELERATOR": ("cpu", "cuda"),
    "WITH_MPI": ("0", "1"),
    "TORCH_INDEX": ("pip", "URL", "FOLDER"),  # pip: where its own configuration looks
    "HOROVOD_WHEEL": ("build", "FILE", "URL"),
}
PHASES = {
    "environment": "make .venv",
    "packages": "download and install the packages (0.6 GB; 3 GB with a CUDA build of torch, see TORCH_INDEX)",
    "fetch": "fetch Horovod's source",
    "edits": "apply the edits of install/horovod/edits",
    "compile": "compile Horovod, the longest part",
    "install": "install Horovod",
    "check": "import it with each framework",
}


class Progress:
    """Says which phase of the setup begins, and in the end how many seconds each took."""

    def __init__(self) -> None:
        self._began: dict[str, float] = {}

    @property
    def phase(self) -> str:
        """The one that began last."""
        return list(self._began)[-1]

    def begin(self, phase: str) -> None:
        """Ends the phase before, if there is one."""
        self._began[phase] = time.monotonic()
        print(f"[{list(PHASES).index(phase) + 1}/{len(PHASES)}] {PHASES[phase]}", flush=True)

    def summary(self) -> str:
        """The seconds of each phase that there was, and of all."""
        times = [*self._began.values(), time.monotonic()]
        each = [f"{phase} {end - start:.0f}" for phase, start, end in zip(self._began, times, times[1:], strict=False)]
        return f"{times[-1] - times[0]:.0f} seconds: {', '.join(each)}"


def read_options(arguments: list[str], last: dict[str, str]) -> dict[str, str]:
    """The options of the command line, over those of the last time, over the defaults."""
    options = {name: choices[0] for name, choices in CHOICES.items()} | last
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "TORCH_INDEX":
            options[name] = read_index(value)
        elif name == "HOROVOD_WHEEL":
            options[name] = read_wheel(value)
        elif value in CHOICES.get(name, ()):
            options[name] = value
        else:
            valid = " ".join(f"{name}={'|'.join(choices)}" for name, choices in CHOICES.items())
            sys.exit(f"{argument}: not an option of the setup; choose from {valid}")
    return options


def read_index(value: str) -> str:
    """Where torch comes from: pip, an address, or the whole path of a folder."""
    if value == "pip" or re.fullmatch(r"https?://[^/\s]+\S*", value):
        return value
    if value and Path(value).is_dir():
        return str(Path(value).resolve())
    sys.exit(f"TORCH_INDEX={value}: neither an http(s) URL nor a folder; pip's own choice is TORCH_INDEX=pip")


def read_wheel(value: str) -> str:
    """Which Horovod is installed: build, an address, or the whole path of a file."""
    if value == "build" or re.fullmatch(r"https?://[^/\s]+\S*\.whl(#sha256=[0-9a-f]{64})?", value):
        return value
    if value.endswith(".whl") and Path(value).is_file():
        return str(Path(value).resolve())
    sys.exit(
        f"HOROVOD_WHEEL={value}: neither a wheel's file nor its http(s) URL; the build's own is HOROVOD_WHEEL=build"
    )


def wanted_state(options: dict[str, str]) -> dict[str, object]:
    """Everything that decides what .venv holds."""
    files = sorted(path for pattern in FILES for path in (ROOT / "install").glob(pattern))
    return {
        "options": options,
        "python": sys.version,
        "root": str(ROOT),
        "project": (ROOT / "pyproject.toml").read_text().partition("[build-system]")[0],
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
    name = "python{}.{}".format(*sys.version_info)
    missing = []
    if not shutil.which(os.environ.get("CXX", "c++")):
        missing.append("a C++ compiler (Debian, Ubuntu: g++; Fedora, RHEL: gcc-c++; or set CXX)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        missing.append(f"Python's headers (Debian, Ubuntu: {name}-dev; Fedora, RHEL: {name}-devel)")
    if find_spec("ensurepip") is None:
        missing.append(f"Python's ensurepip (Debian, Ubuntu: {name}-venv)")
    if missing:
        sys.exit("Horovod is compiled here, and this machine lacks " + " and ".join(missing))


def run(*command: str | Path, problem: str = "") -> None:
    """Runs a step of the setup; leaves with the problem, or with what the step printed, when it fails."""
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(problem or f"make setup: this step failed: {' '.join(map(str, command))}\n{result.stdout}")


def pip() -> tuple[str, ...]:
    """The command that installs into .venv."""
    return str(PYTHON), "-m", "pip", "install", "-qq", "--disable-pip-version-check"


def pip_install(*arguments: str, problem: str = "") -> None:
    """Installs into .venv."""
    run(*pip(), *arguments, problem=problem)


def locked() -> dict[str, str]:
    """The pinned packages: "name==version" -> that line of the lock, with the hashes, without the marker."""
    lines = re.findall(r"^(\S+==\S+)[^\\\n]*((?: \\\n +--hash=\S+)+)", LOCK.read_text(), re.MULTILINE)
    return {pin: pin + hashes for pin, hashes in lines}


def install_locked(requirements: list[str]) -> None:
    """Installs packages, whose names and versions are in the lock, if their hashes are there, too."""
    pins = locked()
    unknown = [pin for pin in requirements if pin not in pins]
    if unknown:
        sys.exit(f"install/constraints.txt has no hash of {' '.join(unknown)}")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(pins[pin] + "\n" for pin in requirements))
        file.flush()
        pip_install("--no-deps", "--require-hashes", "--no-build-isolation", "-r", file.name)


def resolve(requirement: str) -> list[str]:
    """The packages, as "name==version", that the requirement needs and .venv lacks, within the pinned versions."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        # With hashes, pip would want one of the project's own folder, too.
        file.write(re.sub(r" *\\\n +--hash=\S+", "", LOCK.read_text()))
        file.flush()
        looking = ("--dry-run", "--report", "-", "--no-build-isolation", "-c", file.name, requirement)
        result = subprocess.run([*pip(), *looking], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit("make setup: pip found no packages that fit together; the reason stands above")
    found = [package for package in json.loads(result.stdout)["install"] if "dir_info" not in package["download_info"]]
    return ["{}=={}".format(normalized(one["metadata"]["name"]), one["metadata"]["version"]) for one in found]


def normalized(name: str) -> str:
    """A package's name as the lock has it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def torch_source(index: str) -> list[str]:
    """What tells pip to take torch from the index, an address or a folder, instead of the index that pip uses else."""
    if index == "pip":
        return []
    return ["--index-url", index] if "://" in index else ["--no-index", "--find-links", index]


def install_packages(extras: list[str], index: str) -> None:
    """Installs the project's packages into .venv, in place, with those of the extras."""
    install_locked([pin for pin in locked() if pin.startswith(("setuptools==", "wheel=="))])
    if "torch" in extras:
        # By itself, as each index has other builds of it, of which none is pinned; the next step leaves it.
        (torch,) = (pin for pin in locked() if pin.startswith("torch=="))
        problem = f"TORCH_INDEX={index}: has no {torch} for this Python; use another"
        pip_install("--no-deps", *torch_source(index), torch, problem=problem)
    install_locked(resolve(f".[{','.join(extras)}]"))
    pip_install("--no-deps", "--no-build-isolation", "--editable", ".")


def build_wheel(progress: Progress) -> str:
    """Builds Horovod's wheel, unless the cache has it, and returns its path."""
    command = [str(PYTHON), "install/horovod/wheel.py"]  # which reads the options of .venv in its setup.json
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as build:
        line = ""
        for line in build.stdout or ():  # the phases, and last the path
            if line.strip() in PHASES:
                progress.begin(line.strip())
    if build.returncode:
        sys.exit("make setup: Horovod was not built; the reason stands above")
    if progress.phase == "packages":
        print("Horovod, as built for these packages before, is in the user's cache", flush=True)
    return line.strip()


def main() -> None:
    """Command line entry."""
    if sys.version_info[:2] not in PYTHONS:
        supported = " or ".join(f"{major}.{minor}" for major, minor in PYTHONS)
        sys.exit(
            f"The setup needs Python {supported}, not {sys.version.split()[0]}: make setup PYTHON=/path/to/python3"
        )
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
    chosen = " ".join(f"{name}={value}" for name, value in options.items())
    print(f"Setting up .venv ({chosen}): 4 to 6 minutes on 2 cores where Horovod is compiled", flush=True)
    progress = Progress()
    progress.begin("environment")
    # From scratch, so that neither an interrupted setup nor the packages of other options leave anything behind. The
    # interpreter is the one behind all links, as the one that runs this may be in .venv.
    python = Path(sys.executable).resolve()
    shutil.rmtree(VENV, ignore_errors=True)
    run(python, "-m", "venv", VENV)
    STATE.write_text(json.dumps({"options": options}))
    fill(options, progress)
    unfinished = STATE.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(state, indent=2))
    unfinished.replace(STATE)
    print(f"Set up in {progress.summary()}. Next: make train, or make help", flush=True)


def fill(options: dict[str, str], progress: Progress) -> None:
    """Puts into the new .venv what the options ask for."""
    cuda, mpi = options["ACCELERATOR"] == "cuda", options["WITH_MPI"] == "1"
    frameworks = options["FRAMEWORKS"].split(",")
    of_frameworks = [f"{name}-cuda" if cuda and name == "tf" else name for name in frameworks]
    progress.begin("packages")
    install_packages(["build", "dev", *of_frameworks, *["mpi"] * mpi], options["TORCH_INDEX"])
    wheel = options["HOROVOD_WHEEL"]
    if wheel == "build":
        wheel = build_wheel(progress)
    progress.begin("install")
    pip_install("--no-deps", wheel, problem=f"HOROVOD_WHEEL={wheel}: cannot be installed with this Python")
    progress.begin("check")
    for framework in frameworks:
        run(PYTHON, "-c", f"import common.{framework}.distributed.runtime")


if __name__ == "__main__":
    main()

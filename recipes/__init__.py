"""Training recipes: `python -m recipes` lists them, `python -m recipes.<name> --help` explains one."""

import sys
from importlib.util import find_spec

if find_spec("omegaconf") is None:  # this is not the Python of the virtual environment
    print(
        "omegaconf: not installed; activate the environment first: source .venv/bin/activate (make setup makes it)",
        file=sys.stderr,
    )
    sys.exit(2)

"""Prints which extra is missing if a framework is not installed."""

import math
import os
import sys
import time
from importlib.util import find_spec


def require(extra: str, *modules: str) -> None:
    """Exits with status 2 and one message if a module of the extra is not installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        if os.environ.get("HOROVOD_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")) == "0":
            print(
                f"{', '.join(missing)}: not installed; it comes with the extra '{extra}': "
                f"make setup FRAMEWORKS={extra} (or FRAMEWORKS=torch,tf for both)",
                file=sys.stderr,
                flush=True,
            )
        # Ranks cannot communicate yet, and the launcher ends the others shortly after the first rank exits: so all exit
        # at the same full second, at least half a second after rank 0 has printed.
        now = time.time()
        time.sleep(math.ceil(now + 0.5) - now)
        sys.exit(2)

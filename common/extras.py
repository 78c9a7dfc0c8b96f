"""Says which extra is missing when a framework is not installed."""

import math
import os
import sys
import time
from importlib.util import find_spec


def require(extra: str, *modules: str) -> None:
    """Leaves with status 2 and one message when a module of the extra is not installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        if os.environ.get("HOROVOD_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")) == "0":
            print(
                f"{', '.join(missing)}: not installed; it comes with the extra '{extra}': "
                f"make setup FRAMEWORKS={extra} (or FRAMEWORKS=torch,tf for both)",
                file=sys.stderr,
                flush=True,
            )
        # Ranks cannot agree on anything yet, and the launcher ends whoever is still there a moment after the first one:
        # all leave at the next full second, when rank 0 has long spoken.
        now = time.time()
        time.sleep(math.ceil(now + 0.5) - now)
        sys.exit(2)

"""Configurations of compressors."""

import os
from typing import Any

from common.config.composition import option, option_names


def method(name: str, **changes: Any) -> Any:
    """The configuration of a method with its defaults, but for changes."""
    cfg = option("compression", name)
    for key, value in ({"min_numel": 0} | changes).items():
        if name != "none":
            setattr(cfg, key, value)
    return cfg


def of_scripts() -> list[str]:
    """The methods with which scripts of one's own are tested; all of them in `make scripts`."""
    return (
        option_names("compression", without=("auto", "none")) if "SCRIPT_RANKS" in os.environ else ["dgc", "powersgd"]
    )

"""Configurations of compressors."""

from typing import Any

from common.config.composition import option


def method(name: str, **changes: Any) -> Any:
    """The configuration of a method with its defaults, but for changes."""
    cfg = option("compression", name)
    for key, value in ({"min_numel": 0} | changes).items():
        if name != "none":
            setattr(cfg, key, value)
    return cfg

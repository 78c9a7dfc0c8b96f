"""Replaces functions of PyTorch, also where a script has imported them by name."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def replace(module: ModuleType, name: str, new: Callable[..., Any]) -> None:
    """Replaces a function of a module, and each module's global that is this function."""
    old = getattr(module, name)
    setattr(module, name, new)
    for other in list(sys.modules.values()):
        names = vars(other) if isinstance(other, ModuleType) else {}
        for key in [key for key, value in list(names.items()) if value is old]:
            names[key] = new

"""A call of model.fit: its arguments by name, and what of it must be the same on all ranks."""

import inspect
import platform
from collections.abc import Callable
from typing import Any

from common.training import provenance

import keras


class Call:
    """A call of a method whose arguments can be changed by name; some models take all but the data as **kwargs."""

    def __init__(self, method: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self._method, signature = method, inspect.signature(method)
        self._bound = signature.bind(*args, **kwargs)
        self._named = set(signature.parameters)
        kinds = {parameter.kind: name for name, parameter in signature.parameters.items()}
        self._collected = kinds.get(inspect.Parameter.VAR_KEYWORD, "")

    def get(self, name: str) -> Any:
        """The value of an argument; None if it is not given."""
        arguments = self._bound.arguments
        return arguments.get(name) if name in self._named else arguments.get(self._collected, {}).get(name)

    def set(self, name: str, value: Any) -> None:
        """Gives an argument a value."""
        arguments = self._bound.arguments
        (arguments if name in self._named else arguments.setdefault(self._collected, {}))[name] = value

    def __call__(self) -> Any:
        """Makes the call."""
        return self._method(*self._bound.args, **self._bound.kwargs)


def facts(call: Call) -> dict[str, Any]:
    """What must be the same on all ranks, by name."""
    names = ("batch_size", "epochs", "steps_per_epoch", "validation_split", "shuffle", "initial_epoch")
    arrays = keras.tree.flatten([call.get("x"), call.get("y")])
    return {
        "arguments of fit": {name: repr(call.get(name)) for name in names},
        "shapes of the data": [str(getattr(array, "shape", None)) for array in arrays],
        "versions": {**provenance.versions(), "python": platform.python_version()},
    }

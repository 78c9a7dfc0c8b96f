"""Commands beside training: python -m recipes <command> key=value ..., one module each with a `main`."""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

from common.errors import ConfigError

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


def parse(schema: type[T], words: Sequence[str]) -> T:
    """Parses the arguments of a command.

    Args:
        schema: a dataclass; fields that are MISSING must be given. The key of run_dir is run.dir.
        words: words of the form key=value.

    Raises:
        ConfigError: a word names no field or has a value of the wrong type, or a required field is missing.
    """
    names = {_key(field.name): field.name for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    cfg = OmegaConf.structured(schema)
    problems = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in names:
            problems.append(f"{word}: no such key; valid keys: {', '.join(names)}, written key=value")
            continue
        try:
            cfg[names[key]] = None if value == "null" else value  # converted to the field's type
        except OmegaConfBaseException as error:
            problems.append(f"{word}: wrong type: {str(error).splitlines()[0]}")
    if not problems:
        problems = [f"{key}=: must be given" for key, name in names.items() if OmegaConf.is_missing(cfg, name)]
    if problems:
        raise ConfigError(problems)
    arguments: T = OmegaConf.to_object(cfg)  # type: ignore[assignment]
    return arguments


def _key(name: str) -> str:
    """The key of a field on the command line."""
    return "run.dir" if name == "run_dir" else name

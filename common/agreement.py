"""How ranks agree on whether to go on: what one finds wrong, all raise."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from common.config import ConfigError


@contextmanager
def joint_check(gather: Callable[[Any], list[Any]]) -> Iterator[None]:
    """Every rank leaves this block without an error, or every rank leaves it with the ConfigErrors of all.

    Args:
        gather: gives each rank's value to all ranks, in the order of ranks.

    Raises:
        ConfigError: with the problems of all ranks, each once.
    """
    problems: list[str] = []
    try:
        yield
    except ConfigError as error:
        problems = error.problems
    everyones = [problem for of_rank in gather(problems) for problem in of_rank]
    if everyones:
        raise ConfigError(list(dict.fromkeys(everyones)))

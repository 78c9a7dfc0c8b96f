"""Which random numbers a rank draws in a script of your own: its rows of the whole batch's, or its own."""

from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import ConfigError

KINDS = ("batch", "rank")
_kind = ["batch"]


def choose(kind: str) -> None:
    """Chooses "batch", rows of what is drawn for the whole batch, or "rank", numbers of each rank's own.

    Raises:
        ConfigError: the kind is unknown.
    """
    if kind not in KINDS:
        raise ConfigError([f"noise={kind!r}: choose from {', '.join(KINDS)}"])
    _kind[0] = kind


def is_of_rank() -> bool:
    """Whether each rank draws numbers of its own."""
    return _kind[0] == "rank"


@contextmanager
def of_rank() -> Iterator[None]:
    """Within, each rank draws numbers of its own."""
    kind, _kind[0] = _kind[0], "rank"
    try:
        yield
    finally:
        _kind[0] = kind

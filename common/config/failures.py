"""What `chaos` may say: which failures are made on purpose, and when."""

import math
from dataclasses import dataclass
from typing import Any, get_type_hints

from common.errors import ConfigError

KINDS = ("kill", "freeze", "slow", "nan", "bitflip", "drop_link", "corrupt_checkpoint", "full_disk")
EXAMPLE = 'chaos="kill:rank=1,step=120"'


@dataclass(frozen=True)
class Failure:
    """A kind of failure, and when and where it happens.

    Attributes:
        kind: one of KINDS.
        rank: the rank; -1: all ranks, or with p, each by itself.
        step: number of the step before which it happens; for slow, the first one; 0: given by p.
        p: its probability in each step, drawn from the run's seed; 0: not random.
        seconds: how long it lasts: freeze; slow, in each step.
        bytes: full_disk: largest size of a file that can still be written.
    """

    kind: str
    rank: int = -1
    step: int = 0
    p: float = 0.0
    seconds: float = 0.0
    bytes: int = 0


def parse(text: str) -> list[Failure]:
    """The failures of a text such as "kill:rank=1,step=120;slow:rank=2,seconds=0.1".

    Raises:
        ConfigError: it is none.
    """
    return [_parsed(part) for part in filter(None, (part.strip() for part in text.split(";")))]


def _parsed(part: str) -> Failure:
    kind, _, rest = part.partition(":")
    problem = (
        f"chaos={part}: must be {'|'.join(KINDS)} with step= or p=, and maybe rank=, seconds= and bytes=, such as "
        f"{EXAMPLE}"
    )
    types: dict[str, Any] = get_type_hints(Failure)
    del types["kind"]  # it stands before the colon
    try:
        values = {name: types[name](value) for name, value in (word.split("=") for word in rest.split(",") if word)}
    except (KeyError, ValueError):
        raise ConfigError([problem]) from None
    failure = Failure(kind, **values)
    is_at_step, is_random = failure.step > 0 and not failure.p, 0 < failure.p <= 1 and not failure.step
    is_when = failure.step >= 0 and not failure.p if kind == "slow" else is_at_step or is_random
    if kind not in KINDS or not is_when or failure.rank < -1 or not 0 <= failure.seconds < math.inf:
        raise ConfigError([problem])
    for name, kinds in (("seconds", ("slow", "freeze")), ("bytes", ("full_disk",))):
        if kind in kinds and getattr(failure, name) <= 0:
            raise ConfigError([f"chaos={part}: {kind} needs {name}="])
    return failure

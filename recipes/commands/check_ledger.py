"""Says for each epoch of a run whether each example was used once.

    python -m recipes check-ledger run.dir=FOLDER

Needs a run with data.ledger=true. Exits with status 1 if an example was lost or used twice.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.data import example_log
from recipes.commands import parse

from omegaconf import MISSING


@dataclass
class Arguments:
    """The arguments of the command."""

    run_dir: str = MISSING


def main(words: Sequence[str]) -> None:
    """Checks the ledger of a run."""
    judgements = list(example_log.check(Path(parse(Arguments, words).run_dir)))
    for _, line in judgements:
        print(line)
    if not all(is_right for is_right, _ in judgements):
        sys.exit(1)

"""Says for each epoch of a run whether each example was used once.

    python -m recipes check-ledger run.dir=FOLDER

Needs a run with data.ledger=true. Status 1 when an example was lost or used twice.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import ledger
from common.commands import parse

from omegaconf import MISSING


@dataclass
class Arguments:
    """What the command is told."""

    run_dir: str = MISSING


def main(words: Sequence[str]) -> None:
    """Checks the ledger of a run."""
    judgements = list(ledger.check(Path(parse(Arguments, words).run_dir)))
    for _, line in judgements:
        print(line)
    if not all(is_right for is_right, _ in judgements):
        sys.exit(1)

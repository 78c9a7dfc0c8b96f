"""Whatever a file holds, it is read or refused with a message: soon, in little memory, and without a look elsewhere."""

import sys
from pathlib import Path

from tests.helpers.launch import run

import pytest

# tests/helpers/fuzz_job.py says what is changed; the changes are the same each time.
MUTANTS = {
    **{"checkpoint": 450, "idx": 300, "image_shards": 300, "ledger": 250},
    **{"metrics": 200, "text": 100, "text_shards": 400},
}


@pytest.mark.parametrize("reader", MUTANTS)
def test_any_contents_are_read_or_refused(reader: str, tmp_path: Path) -> None:
    result = run([sys.executable, "-m", "tests.helpers.fuzz_job", reader, MUTANTS[reader], tmp_path])
    assert result.returncode == 0, result.stdout
    assert result.stdout.endswith(f"{MUTANTS[reader]} mutants, 0 misread\n")

"""Scripts as other people write them: alone as their authors wrote them, and distributed, they come to the same."""

import os
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tests.helpers import script_job
from tests.helpers.launch import FRAMEWORKS, ROOT, horovodrun, run

import numpy as np
import pytest

TITLES = {"torch": "PyTorch", "keras": "Keras"}
OF_FRAMEWORK = {"torch": "torch", "tf": "keras"}
SCRIPTS = [(OF_FRAMEWORK[name], script) for name in FRAMEWORKS for script in script_job.sources(OF_FRAMEWORK[name])]
RANKS = [int(number) for number in os.environ.get("SCRIPT_RANKS", "2").split(",")]
# float16 has 11 bits: sums in another order differ by more.
TOLERANCE = {"mixed_precision": 2e-2, "amp": 2e-2}

Outcomes = Callable[[str, int], tuple[Path, str]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Gives the folder of a framework's outcomes, and the output; 0 ranks: as the authors wrote the scripts."""

    @cache
    def of_ranks(framework: str, num_ranks: int) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp(f"{framework}-{num_ranks}-")
        arguments = ("-m", "tests.helpers.script_job", framework, str(folder))
        if num_ranks:
            job = horovodrun(num_ranks, *arguments, timeout=600)
        else:
            job = run([sys.executable, *arguments], timeout=600)
        return folder, job.stdout

    return of_ranks


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize(("framework", "name"), SCRIPTS)
def test_a_script_gives_what_its_author_got(framework: str, name: str, num_ranks: int, outcomes: Outcomes) -> None:
    (alone, output), (together, of_ranks) = outcomes(framework, 0), outcomes(framework, num_ranks)
    path = alone / f"{name}.0.npz"
    assert path.exists(), output
    expected = np.load(path)
    for rank in range(num_ranks):
        path = together / f"{name}.{rank}.npz"
        assert path.exists(), of_ranks
        found = np.load(path)
        assert set(found) == set(expected)
        for key, values in expected.items():
            bound = TOLERANCE.get(name, 1e-5)
            atol = bound * np.abs(values).max(initial=0)
            np.testing.assert_allclose(found[key], values, rtol=bound, atol=atol, err_msg=f"{key} on rank {rank}")


@pytest.mark.parametrize("framework", sorted({framework for framework, _ in SCRIPTS}))
def test_few_lines_are_changed(framework: str) -> None:
    sources = script_job.sources(framework)
    numbers = {name: script_job.changed_lines(source) for name, source in sources.items()}
    assert np.median(list(numbers.values())) <= 4
    page = (ROOT / "docs" / "your-own-script.md").read_text()
    for name, number in numbers.items():
        assert re.search(rf"{TITLES[framework]} \| `{name}` \| [^|]* \| {number} \|", page), name
    for source in sources.values():
        authors = script_job.authors_version(source)
        assert "horovod" not in authors
        assert len(authors.splitlines()) >= len(source.splitlines()) - script_job.changed_lines(source)

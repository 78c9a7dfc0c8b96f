"""Runs tests on ranks: a test marked `ranks(2, 4)` runs once per framework and number of ranks, on every rank.

Marked `ranks(2, framework="torch")` it runs with one framework alone.

All such tests of one framework and number share one launch of horovodrun, in which pytest runs on each rank. The
session that was started by hand launches it when it meets the first of them, and reports what the ranks reported.
"""

import importlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

from tests import launch

import pytest

RESULTS = "TEST_RANKS_RESULTS"  # in the environment of a rank: the folder that the ranks of its launch share
SECONDS = 300  # for one launch; a hang ends here

Reports = dict[str, list[str]]  # test -> what went wrong on ranks; one "" for each rank where nothing did


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("ranks")
    if marker:
        metafunc.fixturenames += ["framework", "num_ranks"]
        only = marker.kwargs.get("framework")
        metafunc.parametrize("framework", [name for name in launch.FRAMEWORKS if only in (None, name)])
        metafunc.parametrize("num_ranks", marker.args)


@pytest.fixture
def runtime(framework: str) -> ModuleType:
    """The runtime module of the framework's binding."""
    return importlib.import_module(f"common.{framework}.distributed.runtime")


@pytest.fixture
def shared_path(request: pytest.FixtureRequest) -> Path:
    """A folder that all ranks of a test share."""
    folder = Path(os.environ[RESULTS], str(request.node.originalname))
    folder.mkdir(exist_ok=True)
    return folder


Launches: TypeAlias = Callable[[str, int], Path]


@pytest.fixture
def launches(request: pytest.FixtureRequest) -> Launches:
    """Gives the folder of a launch, with those of its tests; starts it if it was not yet."""
    session = request.session

    def folder(framework: str, num_ranks: int) -> Path:
        return _launched(session, (framework, num_ranks))[2]

    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    if isinstance(item, pytest.Function) and _launch_key(item) and RESULTS not in os.environ:
        # Neither fixtures nor the test itself run in this process.
        item.fixturenames.clear()
        item._request._fillfixtures = lambda: None  # type: ignore[method-assign]
        item.runtest = lambda: _report(item)  # type: ignore[method-assign]
    return (yield)


def _launch_key(item: pytest.Item) -> tuple[str, int] | None:
    """The framework and number of ranks that a marked test runs with."""
    if not isinstance(item, pytest.Function) or not item.get_closest_marker("ranks"):
        return None
    params = item.callspec.params
    return str(params["framework"]), int(str(params["num_ranks"]))


def _report(item: pytest.Function) -> None:
    """Passes or fails as the test did on its ranks; the first test of a launch starts it."""
    key = _launch_key(item)
    assert key is not None
    reports, output, _ = _launched(item.session, key)
    of_ranks = reports.get(item.nodeid, [])
    problems = [problem for problem in of_ranks if problem]
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)
    if len(of_ranks) == key[1]:
        return
    if any(problem for others in reports.values() for problem in others):
        pytest.skip("an earlier test of the same launch failed")
    pytest.fail(f"reported by {len(of_ranks)} of {key[1]} ranks; the launch printed:\n{output}", pytrace=False)


_LAUNCHES = pytest.StashKey[dict[tuple[str, int], tuple[Reports, str, Path]]]()


def _launched(session: pytest.Session, key: tuple[str, int]) -> tuple[Reports, str, Path]:
    """The reports, the output and the folder of a launch, which runs all tests of the session that have the key."""
    launches = session.config.stash.setdefault(_LAUNCHES, {})
    if key not in launches:
        ids = [other.nodeid for other in session.items if _launch_key(other) == key]
        if not ids:
            pytest.skip(f"builds on tests that run on {key[1]} ranks with {key[0]}, and none was chosen")
        folder = session.config._tmp_path_factory.mktemp("-".join(map(str, key)))  # type: ignore[attr-defined]
        launches[key] = (*_launch(ids, key[1], folder), folder)
    return launches[key]


def _launch(ids: list[str], num_ranks: int, folder: Path) -> tuple[Reports, str]:
    """Runs the tests on ranks and returns their reports, and what was printed."""
    (folder / "tests").write_text("\n".join(ids))
    # -x: a rank that failed would leave the others alone in the next collective.
    options = ("-x", "-q", "-p", "no:cacheprovider", f"@{folder / 'tests'}")
    try:
        job = launch.horovodrun(num_ranks, "-m", "pytest", *options, timeout=SECONDS, env={RESULTS: str(folder)})
        output = job.stdout
    except AssertionError as error:
        output = str(error)
    reports: Reports = {}
    for path in sorted(folder.glob("rank*.jsonl")):
        for line in path.read_text().splitlines():
            for test, problem in json.loads(line).items():
                reports.setdefault(test, []).append(problem and f"{path.stem}:\n{problem}")
    return reports, output


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if RESULTS in os.environ and (report.when == "call" or report.failed):
        rank = os.environ.get("HOROVOD_RANK") or os.environ["OMPI_COMM_WORLD_RANK"]
        with (Path(os.environ[RESULTS]) / f"rank{rank}.jsonl").open("a") as file:
            file.write(json.dumps({report.nodeid: report.longreprtext if report.failed else ""}) + "\n")

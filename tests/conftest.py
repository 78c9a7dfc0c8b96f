"""Runs tests on ranks: a test marked `ranks(2, 4)` runs once per framework and number of ranks, on every rank.

Marked `ranks(2, framework="torch")` it runs with one framework alone.

All such tests of one framework and number share one launch of horovodrun, in which pytest runs on each rank. The
session that was started by hand launches it when it meets the first of them, and reports what the ranks reported.

`publish` gives such a test a folder under a name, and `published` gives it to other tests, those without ranks or of
other launches: marked `ranks(3, after=2)`, a test's launch follows that of 2 ranks. `process_sets=` is a function that
gives the subsets of so many ranks in which a test communicates: Horovod needs them at its start.
"""

import importlib
import os
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.helpers import ranks
from tests.helpers.launch import FRAMEWORKS
from tests.helpers.ranks import Launcher, Publish, Published

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("ranks")
    if marker:
        metafunc.fixturenames += ["framework", "num_ranks"]
        only = marker.kwargs.get("framework")
        metafunc.parametrize("framework", [name for name in FRAMEWORKS if only in (None, name)])
        metafunc.parametrize("num_ranks", marker.args)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class OneLauncher(LoadScopeScheduling):
        """One process has all tests that need a launch; the others stay together by file."""

        def _split_scope(self, nodeid: str) -> str:
            return "launches" if ranks.needs_launch(nodeid) else nodeid.partition("::")[0]

    return OneLauncher(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # Beside the ranks a test runs no fixtures of its own: it only needs what reports.
        if isinstance(item, pytest.Function) and ranks.key_of(item) and not ranks.is_rank():
            item.fixturenames[:] = ["launcher"]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if ranks.is_rank() or not ranks.key_of(pyfuncitem):
        return None
    launcher: Launcher = pyfuncitem.funcargs["launcher"]  # type: ignore[assignment]
    launcher.report(pyfuncitem)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if ranks.is_rank():
        ranks.note(report)


@pytest.fixture(scope="session")
def launcher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    """Launches the ranks of marked tests."""
    return Launcher(request.session.items, tmp_path_factory.mktemp("launches"))


@pytest.fixture(scope="session", autouse=True)
def started(request: pytest.FixtureRequest) -> None:
    """Starts Horovod on a rank, with the process sets of all tests of the launch."""
    if ranks.is_rank():
        (framework, _), *_ = filter(None, map(ranks.key_of, request.session.items))
        runtime = importlib.import_module(f"common.{framework}.distributed.runtime")
        runtime.init(sorted(ranks.process_sets(request.session.items)))


@pytest.fixture
def runtime(framework: str) -> ModuleType:
    """The runtime module of the framework's binding."""
    return importlib.import_module(f"common.{framework}.distributed.runtime")


@pytest.fixture
def shared_path(request: pytest.FixtureRequest) -> Path:
    """A folder that all ranks of a test share, and its other parameters."""
    module, _, _ = request.node.nodeid.partition("::")
    folder = Path(os.environ[ranks.FOLDER], Path(module).stem, str(request.node.originalname))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def publish() -> Publish:
    """Gives a test on ranks the folder for results that others build on, by its name."""
    return partial(ranks.publish, Path(os.environ[ranks.FOLDER]))


@pytest.fixture
def published(request: pytest.FixtureRequest) -> Published:
    """Gives the folder that a test on ranks has published, by framework, number of ranks and name."""
    if ranks.is_rank():
        return partial(ranks.published, Path(os.environ[ranks.FOLDER]).parent)
    launcher: Launcher = request.getfixturevalue("launcher")

    def folder(framework: str, num_ranks: int, name: str) -> Path:
        launcher.launch((framework, num_ranks))
        return ranks.published(launcher.folder, framework, num_ranks, name)

    return folder

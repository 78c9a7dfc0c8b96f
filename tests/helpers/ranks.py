"""Tests on ranks: one launch of horovodrun for all that have the same framework and number of ranks."""

import importlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from tests.helpers import launch

import pytest

FOLDER = "TEST_RANKS_FOLDER"  # in the environment of a rank: the folder of its launch
SECONDS = 900  # for one launch, on a machine that does other things, too; a hang ends here

Key: TypeAlias = tuple[str, int]  # framework and number of ranks
Published: TypeAlias = Callable[[str, int, str], Path]
Publish: TypeAlias = Callable[[str], Path]


class Launch(NamedTuple):
    """What came of a launch.

    Attributes:
        reports: test -> (outcome, why) of each rank that has run it.
        output: what was printed.
    """

    reports: dict[str, list[tuple[str, str]]]
    output: str


def is_rank() -> bool:
    """Whether this process is a rank that was launched to run tests."""
    return FOLDER in os.environ


def key_of(item: pytest.Item) -> Key | None:
    """The framework and number of ranks that a marked test runs with."""
    if not isinstance(item, pytest.Function) or not item.get_closest_marker("ranks"):
        return None
    params = item.callspec.params
    return str(params["framework"]), int(str(params["num_ranks"]))


def needs_launch(nodeid: str) -> bool:
    """Whether a test runs on ranks, or builds on what such tests have published."""
    path, _, name = nodeid.partition("::")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    function = getattr(module, name.partition("[")[0])
    marks = [getattr(owner, "pytestmark", []) for owner in (module, function)]
    names = {mark.name for given in marks for mark in (given if isinstance(given, list) else [given])}
    return "ranks" in names or "published" in inspect.signature(function).parameters


def option(item: pytest.Item, name: str) -> Any:
    """A keyword of a test's mark `ranks`."""
    marker = item.get_closest_marker("ranks")
    return marker and marker.kwargs.get(name)


def process_sets(items: Iterable[pytest.Item]) -> set[tuple[int, ...]]:
    """The subsets of ranks that the tests of this launch communicate in."""
    known = {(option(item, "process_sets"), item.callspec.params["num_ranks"]) for item in items if key_of(item)}  # type: ignore[attr-defined]
    return {tuple(ranks) for sets_of, num_ranks in known if sets_of for ranks in sets_of(num_ranks)}


def published(launches: Path, framework: str, num_ranks: int, name: str) -> Path:
    """Where a test on ranks publishes results under a name; skips the test that asks if there are none."""
    folder = publish(launches / f"{framework}-{num_ranks}", name)
    if not folder.exists():
        pytest.skip(f"builds on {name!r} of {num_ranks} ranks with {framework}; its test was not chosen or failed")
    return folder


def publish(folder: Path, name: str) -> Path:
    """The folder of published results in the folder of a launch."""
    return folder / "published" / name


class Launcher:
    """Starts a launch when the first of its tests is met.

    Args:
        items: all tests of the session.
        folder: for the files of all launches.
    """

    def __init__(self, items: Sequence[pytest.Item], folder: Path) -> None:
        self.folder = folder
        self._items: dict[Key, list[pytest.Item]] = {}
        for item in items:
            if key := key_of(item):
                self._items.setdefault(key, []).append(item)
        self._launches: dict[Key, Launch] = {}

    def report(self, item: pytest.Item) -> None:
        """Passes or fails as the test did on its ranks."""
        key = key_of(item)
        assert key is not None
        reports, output = self.launch(key)
        of_ranks = reports.get(item.nodeid, [])
        if problems := [why for outcome, why in of_ranks if outcome == "failed"]:
            pytest.fail("\n".join(problems), pytrace=False)
        if len(of_ranks) == key[1]:
            if skipped := [why for outcome, why in of_ranks if outcome == "skipped"]:
                pytest.skip(skipped[0])
            return
        if any(outcome == "failed" for others in reports.values() for outcome, _ in others):
            pytest.skip("an earlier test of the same launch failed")
        pytest.fail(f"reported by {len(of_ranks)} of {key[1]} ranks; the launch printed:\n{output}", pytrace=False)

    def launch(self, key: Key) -> Launch:
        """Runs all tests of a launch, unless that was done, after the launches that they build on."""
        if key not in self._launches:
            items = self._items.get(key, [])
            for before in sorted({option(item, "after") for item in items} - {None}, key=str):
                self.launch(before if isinstance(before, tuple) else (key[0], before))
            folder = self.folder / f"{key[0]}-{key[1]}"
            folder.mkdir()
            self._launches[key] = _launch([item.nodeid for item in items], key[1], folder) if items else Launch({}, "")
        return self._launches[key]


def _launch(ids: Sequence[str], num_ranks: int, folder: Path) -> Launch:
    (folder / "tests").write_text("\n".join(ids))
    # -x: a rank that failed would leave the others alone in the next collective.
    options = ("-x", "-q", "-p", "no:cacheprovider", f"@{folder / 'tests'}")
    try:
        job = launch.horovodrun(num_ranks, "-m", "pytest", *options, timeout=SECONDS, env={FOLDER: str(folder)})
        output = job.stdout
    except AssertionError as error:
        output = str(error)
    reports: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(folder.glob("rank*.jsonl")):
        for line in path.read_text().splitlines():
            test, outcome, why = json.loads(line)
            reports.setdefault(test, []).append((outcome, f"{path.stem}:\n{why}" if outcome == "failed" else why))
    return Launch(reports, output)


def note(report: pytest.TestReport) -> None:
    """Leaves what came of a test on this rank to the session that launched it."""
    if report.when == "call" or not report.passed:
        rank = os.environ.get("HOROVOD_RANK") or os.environ["OMPI_COMM_WORLD_RANK"]
        why = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else report.longreprtext
        with (Path(os.environ[FOLDER]) / f"rank{rank}.jsonl").open("a") as file:
            file.write(json.dumps([report.nodeid, report.outcome, why]) + "\n")

"""Runs survive what a simulation lets happen to them; and the simulation finds faults that are put in on purpose."""

import shutil
import sys
from collections.abc import Callable
from typing import Any

from common import file_io
from common.data.sampler import TrainingSampler
from common.parallel.staleness import StalenessTracker
from common.training import checkpoint_files
from common.training.checkpoint import Checkpoints
from common.training.elastic import Membership
from tests.simulation.scenario import Fault, Plan, drawn, problem_of, report, shrunk, trace_of

import pytest

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="pathlib binds the functions of os for itself")

NUM_SEEDS = 100  # make simulate has 10,000
MOST_SEEDS = 1000  # in which a fault on purpose is found


def test_runs_survive() -> None:
    wrong = [seed for seed in range(NUM_SEEDS) if problem_of(seed)]
    assert not wrong, report(wrong[0])


def test_a_seed_replays_to_the_letter() -> None:
    for seed in (3, 4, 5):
        assert trace_of(drawn(seed)) == trace_of(drawn(seed))


def test_the_last_host_comes_back() -> None:
    """One host leaves, and the other one loses a rank: its slots are not filled when it is used again."""
    faults = (Fault(4.8, "leave", 1), Fault(4.9, "kill", 1), Fault(9.4, "join", 1))
    plan = Plan(0, True, False, 52, {"max_steps": 27, "global_batch_size": 9}, {"a": 2, "b": 2}, faults)
    trace, problem = trace_of(plan)
    assert not problem
    assert any("2 ranks: a, a" in line for line in trace)


def repeat_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever goes on begins the epoch again, as Horovod's own sampler may (horovod#3399)."""
    original = TrainingSampler.from_config.__func__  # type: ignore[attr-defined]

    def from_config(cls: Any, cfg: Any, number: int, topology: Any, restored: Any = (), classes: Any = None) -> Any:
        if restored:
            restored = {**restored, "position": {**restored["position"], "offset": 0}}
        return original(cls, cfg, number, topology, restored or {}, classes)

    monkeypatch.setattr(TrainingSampler, "from_config", classmethod(from_config))


def skip_the_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has a commit does not wait for those who have none, as in Horovod's own elastic state (horovod#3494)."""
    original = Membership.newest

    def newest(self: Membership, runtime: Any, rank: int) -> Any:
        return self.commit if self.commit else original(self, runtime, rank)

    monkeypatch.setattr(Membership, "newest", newest)


def rename_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint gets its name before its contents are on the disk."""
    monkeypatch.setattr(file_io, "sync", lambda file: file.flush())


def prune_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old checkpoints are removed before there is a new one."""
    original = Checkpoints._write

    def write(self: Checkpoints, step: int, *contents: Any) -> None:
        for old in checkpoint_files.saved(self._folder)[: -self._cfg.train.keep_checkpoints + 1 or None]:
            shutil.rmtree(old)
        original(self, step, *contents)

    monkeypatch.setattr(Checkpoints, "_write", write)


def let_workers_run_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers of a parameter server may be one step farther ahead than they should."""
    monkeypatch.setattr(
        StalenessTracker, "may_go_on", lambda self, worker: self.steps[worker] - self.slowest <= self._max_staleness + 1
    )


PLANTS = [repeat_examples, skip_the_exchange, rename_too_early, prune_too_much, let_workers_run_ahead]


@pytest.mark.parametrize("plant", PLANTS)
def test_faults_on_purpose_are_found(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    seed = next((seed for seed in range(MOST_SEEDS) if problem_of(seed)), None)
    assert seed is not None, f"not found with {MOST_SEEDS} seeds"
    assert report(seed).startswith(f"seed {seed}")


def test_a_report_has_as_few_faults_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    rename_too_early(monkeypatch)
    seed = next(seed for seed in range(MOST_SEEDS) if len(drawn(seed).faults) > 2 and problem_of(seed))
    plan = shrunk(drawn(seed))
    assert trace_of(plan)[1]
    assert [fault.kind for fault in plan.faults] == ["power"]

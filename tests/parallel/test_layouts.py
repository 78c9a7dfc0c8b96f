"""One loss curve for every way of spreading the work: stages, replicas, servers, pieces of the optimizer."""

import json
import re
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

from common.config.composition import compose
from common.config.validation import validate
from common.data import example_log
from common.distributed.topology import Topology
from common.errors import ConfigError
from common.parallel.rank_schedule import RankSchedule
from common.parallel.staleness import StalenessTracker
from common.training import checkpoint, checkpoint_files
from tests.helpers import layouts
from tests.helpers.launch import FRAMEWORKS, ROOT, kill_when, read_events
from tests.helpers.layouts import LAYOUTS, RESUMED, TASKS
from tests.helpers.ranks import Publish, Published
from tests.helpers.runs import losses, train_here

import pytest

LAYOUT_RUNS = "runs in layouts"
SMALL_MLP = ["model.hidden_sizes=[32,32,32]", "train.global_batch_size=60", "train.log_every=1"]

on_ranks = partial(pytest.mark.ranks, process_sets=layouts.process_sets)


@pytest.fixture
def run(framework: str, runtime: ModuleType, num_ranks: int, publish: Publish) -> Callable[..., Path]:
    """Makes a run of tests/helpers/layouts.py in this process, which is one of the ranks, and gives its folder."""

    def make(name: str, *more: str, into: str | None = None) -> Path:
        task, overrides = layouts.runs(num_ranks)[name]
        folder = publish(LAYOUT_RUNS) / (into or name)
        train_here(framework, task, folder, *overrides, *more)
        checkpoint.finish_writing()
        runtime.broadcast_object(None)
        return folder

    return make


@on_ranks(3)  # comes first, as what it might leave behind would stop the others
def test_workers_need_not_wait_for_each_other(run: Callable[..., Path]) -> None:
    folder = run("not waiting")
    events = read_events(folder)
    assert 0 < max(event["staleness"] for event in events if "staleness" in event) <= 4
    assert events[-1]["test_accuracy"] > 0.9
    for is_right, line in example_log.check(folder):
        assert is_right, line


@on_ranks(1, 2, 3, 4)
def test_every_layout_trains(num_ranks: int, run: Callable[..., Path]) -> None:
    """The losses are compared below."""
    for task, layouts_of_task in LAYOUTS[num_ranks].items():
        for layout in layouts_of_task:
            for is_right, line in example_log.check(run(f"{task}/{layout}")):
                assert is_right, (task, layout, line)


@pytest.mark.parametrize(
    ("num_ranks", "task"), [(num_ranks, task) for num_ranks in (2, 3, 4) for task in TASKS if LAYOUTS[num_ranks][task]]
)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_one_loss_curve_for_every_layout(framework: str, num_ranks: int, task: str, published: Published) -> None:
    whole = published(framework, 1, LAYOUT_RUNS) / task / "whole"
    for layout in LAYOUTS[num_ranks][task]:
        run = published(framework, num_ranks, LAYOUT_RUNS) / task / layout
        assert losses(read_events(run)) == pytest.approx(losses(read_events(whole)), rel=1e-5), layout
        first, last = (checkpoint_files.newest(folder)[0] for folder in (whole, run))
        assert first is not None
        assert last is not None
        for old, new in ((first.weights, last.weights), (first.optimizer_state, last.optimizer_state)):
            assert {name: array.shape for name, array in old.items()} == {name: new[name].shape for name in new}


def test_the_summary_has_the_bubble(published: Published) -> None:
    run = published(FRAMEWORKS[0], 2, LAYOUT_RUNS) / "mnist_mlp" / "1f1b"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["num_stages"], summary["num_replicas"]) == (2, 1)
    assert summary["bubble_in_theory"] == pytest.approx(1 / 3)
    assert len(summary["bubble_of_stages"]) == 2
    assert all(0 < bubble < 1 for bubble in summary["bubble_of_stages"])


@on_ranks(3, after=2)
def test_two_stages_go_on_as_two_servers(framework: str, run: Callable[..., Path], published: Published) -> None:
    before = published(framework, 2, LAYOUT_RUNS) / "transformer_lm" / "1f1b"
    curve = losses(read_events(run("goes on", f"resume={before}/checkpoints/step-00000002")))
    assert list(curve) == list(range(3, 10))


@on_ranks(4, after=3)
def test_two_servers_go_on_as_pieces_of_the_optimizer(
    framework: str, run: Callable[..., Path], published: Published
) -> None:
    before = published(framework, 3, LAYOUT_RUNS) / "goes on"
    curve = losses(read_events(run("goes on", f"resume={before}/checkpoints/step-00000004")))
    assert list(curve) == list(range(5, 10))


@pytest.mark.parametrize("num_ranks", [3, 4])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_run_that_goes_on_in_another_layout_has_the_same_curve(
    framework: str, num_ranks: int, published: Published
) -> None:
    whole = losses(read_events(published(framework, 1, LAYOUT_RUNS) / "transformer_lm" / "whole"))
    curve = losses(read_events(published(framework, num_ranks, LAYOUT_RUNS) / "goes on"))
    assert curve == pytest.approx({step: whole[step] for step in curve}, rel=1e-5)


@on_ranks(2, 3)
@pytest.mark.parametrize("name", RESUMED)
def test_stages_that_share_a_weight_go_on_with_what_their_compressors_had(
    num_ranks: int, name: str, run: Callable[..., Path]
) -> None:
    first = run(name)
    second = run(name, f"resume={first}/checkpoints/step-00000004", into=f"{name} again")
    whole, again = (losses(read_events(folder)) for folder in (first, second))
    assert list(again) == [5, 6, 7, 8]
    # To the bit where each stage has one rank; else a rank's residual is no longer its own, but its share.
    expected = {step: whole[step] for step in again}
    assert again == (expected if num_ranks == 2 else pytest.approx(expected, rel=0.02))
    state = checkpoint_files.read(first / "checkpoints/step-00000008")
    shared = next(key for key in state.weights if key.startswith("0.token"))
    assert not {f"{shared}.residual", f"{shared}.velocity", f"{shared}.factor"} & state.gradients.keys()


@on_ranks(4)
def test_stages_compress_and_skip_together(run: Callable[..., Path]) -> None:
    events = read_events(run("compressed stages"))
    skipped = [event["skipped_steps"] for event in events if "skipped_steps" in event]
    assert skipped[0] == 1
    assert skipped[-1] < 30
    curve = losses(events)
    assert curve[40] < 0.97 * max(curve.values())


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_signal_stops_servers_and_workers_after_the_same_step(framework: str, tmp_path: Path) -> None:
    layout = ["parallel=parameter_server", "parallel.mode=async", "parallel.max_staleness=4", "train.epochs=999"]
    command = ["-m", f"recipes.mnist_mlp_{framework}", f"run.dir={tmp_path}", *SMALL_MLP, *layout]
    job = kill_when(lambda: len(read_events(tmp_path)) > 3, 3, *command, signal_number=signal.SIGTERM)
    assert job.returncode != 0
    assert "stopped at step" in job.stdout, job.stdout
    assert checkpoint_files.newest(tmp_path)[0] is not None


def test_the_tracker_keeps_workers_within_the_bound() -> None:
    tracker = StalenessTracker([3, 4], max_staleness=2)
    for _ in range(2):
        tracker.advance(3)
        assert tracker.may_go_on(3)
    tracker.advance(3)
    assert not tracker.may_go_on(3)
    tracker.advance(4)
    assert tracker.may_go_on(3)
    assert (tracker.slowest, tracker.fastest) == (1, 3)
    assert (tracker.take_staleness(), tracker.take_staleness()) == (2, 0)


def test_lanes_are_cut_alike_on_all_ranks_that_have_them() -> None:
    for num_examples in (1, 9, 24, 100):
        sizes: dict[int, set[int]] = {}
        for rank in range(5):
            topology = Topology(rank, 5, rank, 5, replicas_per_stage=(3, 2))
            mine = [num_examples // 6 + (batch_slice < num_examples % 6) for batch_slice in topology.batch_slices]
            rank_schedule = RankSchedule("1f1b", 1, 4, topology)
            for micro_batch, part in rank_schedule.micro_batches(sum(mine)).items():
                sizes.setdefault(micro_batch, set()).add(part.stop - part.start)
        assert len(sizes) == 24
        assert all(len(of_ranks) == 1 for of_ranks in sizes.values())


@pytest.mark.ranks(2)
def test_a_model_that_cannot_be_cut_is_refused_by_all_ranks(framework: str, shared_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.pipeline_stages=2.*the model has 1 layers with weights"):
        train_here(framework, "linear_regression", shared_path / "run", "parallel=pipeline")
    assert not (shared_path / "run").exists()


def test_the_commands_of_the_page_are_valid() -> None:
    text = (ROOT / "docs/parallelism.md").read_text()
    commands = re.findall(r"^    horovodrun -np (\d) python -m recipes\.(\w+)_(?:torch|tf) (.*)$", text, re.M)
    assert len(commands) == 4
    for num_ranks, task, overrides in commands:
        validate(compose(task, overrides.split()), Topology(0, int(num_ranks), 0, int(num_ranks)))

"""One loss curve for every way of spreading the work: stages, replicas, servers, pieces of the optimizer."""

import json
import re
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeAlias

from common.config.composition import compose
from common.config.validation import validate
from common.data import example_log
from common.distributed.topology import Topology
from common.errors import ConfigError
from common.parallel.rank_schedule import RankSchedule
from common.parallel.staleness import StalenessTracker
from common.training import checkpoint
from tests.launch import FRAMEWORKS, ROOT, horovodrun, kill_when, read_events, train
from tests.parallel_job import LAYOUTS, RESUMED, TASKS
from tests.test_recipes import losses

import pytest

Folders: TypeAlias = Callable[[str, int], Path]
SMALL_MLP = ["model.hidden_sizes=[32,32,32]", "train.global_batch_size=60", "train.log_every=1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Gives the folder with the runs of a framework and a number of ranks, which one launch makes."""

    @cache
    def folder(framework: str, num_ranks: int) -> Path:
        path = tmp_path_factory.mktemp("layouts")
        env = {"PYTHONPATH": str(ROOT)}
        result = horovodrun(num_ranks, ROOT / "tests/parallel_job.py", framework, path, timeout=300, env=env)
        assert result.returncode == 0, result.stdout
        return path

    return folder


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_one_loss_curve_for_every_layout(framework: str, num_ranks: int, task: str, runs: Folders) -> None:
    whole = runs(framework, 1) / task / "whole"
    for layout in LAYOUTS[num_ranks][task]:
        run = runs(framework, num_ranks) / task / layout
        assert losses(read_events(run)) == pytest.approx(losses(read_events(whole)), rel=1e-5), layout
        for is_right, line in example_log.check(run):
            assert is_right, (layout, line)
        first, last = (checkpoint.newest(folder)[0] for folder in (whole, run))
        assert first is not None
        assert last is not None
        for old, new in ((first.weights, last.weights), (first.optimizer_state, last.optimizer_state)):
            assert {name: array.shape for name, array in old.items()} == {name: new[name].shape for name in new}


def test_the_summary_has_the_bubble(runs: Folders) -> None:
    summary = json.loads((runs(FRAMEWORKS[0], 2) / "mnist_mlp" / "1f1b" / "summary.json").read_text())
    assert (summary["num_stages"], summary["num_replicas"]) == (2, 1)
    assert summary["bubble_in_theory"] == pytest.approx(1 / 3)
    assert len(summary["bubble_of_stages"]) == 2
    assert all(0 < bubble < 1 for bubble in summary["bubble_of_stages"])


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_run_goes_on_in_another_layout(framework: str, tmp_path: Path, runs: Folders) -> None:
    values = [*TASKS["transformer_lm"], "optimizer=adamw", "train.log_every=1", "train.max_steps=9"]
    cut = ["parallel=pipeline", "parallel.num_micro_batches=2"]
    layouts = [
        (2, "two stages", cut),
        (3, "two servers", ["parallel=parameter_server", "parallel.num_servers=2"]),
        (2, "sharded", ["optimizer.sharded=true"]),
    ]
    whole = losses(read_events(runs(framework, 1) / "transformer_lm" / "whole"))
    start: list[str] = []
    for number, (num_ranks, name, layout) in enumerate(layouts):
        folder = tmp_path / str(number)
        overrides = [*values, *layout, *start, "train.checkpoint_every=2", "train.keep_checkpoints=9"]
        curve = losses(train(num_ranks, f"transformer_lm_{framework}", folder, *overrides))
        assert list(curve) == list(range(2 * number + 1, 10)), name
        assert curve == pytest.approx({step: whole[step] for step in curve}, rel=1e-5), name
        start = [f"resume={folder / f'checkpoints/step-{2 * number + 2:08}'}"]


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_stages_that_share_a_weight_go_on_with_what_their_compressors_had(
    framework: str, num_ranks: int, tmp_path: Path
) -> None:
    job = ROOT / "tests/parallel_job.py"
    result = horovodrun(num_ranks, job, framework, tmp_path, "resumed", timeout=300, env={"PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stdout
    for name in RESUMED:
        whole, again = (losses(read_events(tmp_path / folder)) for folder in (name, f"{name}.again"))
        assert list(again) == [5, 6, 7, 8]
        # To the bit where each stage has one rank; else a rank's residual is no longer its own, but its share.
        expected = {step: whole[step] for step in again}
        assert again == (expected if num_ranks == 2 else pytest.approx(expected, rel=0.02)), name
        state = checkpoint.read(tmp_path / name / "checkpoints/step-00000008")
        shared = next(key for key in state.weights if key.startswith("0.token"))
        assert not {f"{shared}.residual", f"{shared}.velocity", f"{shared}.factor"} & state.gradients.keys()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_stages_compress_and_skip_together(framework: str, tmp_path: Path) -> None:
    layout = ["train.max_steps=40", "parallel=pipeline", "parallel.num_micro_batches=2"]
    half = ["compression=topk", "precision=fp16", "precision.initial_loss_scale=1e8"]
    events = train(4, f"mnist_mlp_{framework}", tmp_path, *SMALL_MLP, *layout, *half)
    skipped = [event["skipped_steps"] for event in events if "skipped_steps" in event]
    assert skipped[0] == 1
    assert skipped[-1] < 30
    curve = losses(events)
    assert curve[40] < 0.97 * max(curve.values())


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_workers_need_not_wait_for_each_other(framework: str, runs: Folders) -> None:
    run = runs(framework, 3) / "not_waiting"
    events = read_events(run)
    assert 0 < max(event["staleness"] for event in events if "staleness" in event) <= 4
    assert events[-1]["test_accuracy"] > 0.9
    for is_right, line in example_log.check(run):
        assert is_right, line


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_signal_stops_servers_and_workers_after_the_same_step(framework: str, tmp_path: Path) -> None:
    layout = ["parallel=parameter_server", "parallel.mode=async", "parallel.max_staleness=4", "train.epochs=999"]
    command = ["-m", f"recipes.mnist_mlp_{framework}", f"run.dir={tmp_path}", *SMALL_MLP, *layout]
    job = kill_when(lambda: len(read_events(tmp_path)) > 3, 3, *command, signal_number=signal.SIGTERM)
    assert job.returncode != 0
    assert "stopped at step" in job.stdout, job.stdout
    assert checkpoint.newest(tmp_path)[0] is not None


def test_clocks_keep_workers_within_the_bound() -> None:
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


@pytest.mark.parametrize(
    ("num_ranks", "overrides", "message"),
    [
        (3, "parallel=pipeline", "parallel.pipeline_stages=2: must divide the number of ranks, 3"),
        (4, "parallel=pipeline parallel.replicas_per_stage=[1,2]", "replicas_per_stage=[1,2]: must be one number for"),
        (2, "parallel=pipeline parallel.num_micro_batches=5", "num_micro_batches=5: must divide the examples of one"),
        (2, "parallel=pipeline parallel.schedule=zigzag", "parallel.schedule=zigzag: must be one of gpipe|1f1b"),
        (
            2,
            "parallel=pipeline parallel.schedule=interleaved",
            "virtual_stages_per_rank=1: must be at least 2 with schedule",
        ),
        (2, "parallel=pipeline compression=auto", "compression=auto: measures parallel=data"),
        (
            2,
            "parallel=parameter_server parallel.mode=async train.on_nonfinite=skip",
            "train.on_nonfinite=skip: all ranks skip the same step",
        ),
        (2, "parallel=pipeline op=adasum", "op=adasum: goes with parallel=data, not pipeline"),
        (2, "parallel=parameter_server parallel.num_servers=2", "parallel.num_servers=2: must be at least 1 and leave"),
        (2, "parallel=parameter_server parallel.max_staleness=2", "max_staleness=2: goes with parallel.mode=async"),
        (2, "parallel=parameter_server parallel.mode=async optimizer.sharded=true", "sharded=true: goes with parallel"),
        (2, "parallel=parameter_server compression=powersgd", "compression=powersgd: is made for sums over all ranks"),
        (2, "parallel=parameter_server parallel.mode=async precision=fp16", "precision=fp16: all ranks skip the same"),
    ],
)
def test_layouts_that_cannot_be(num_ranks: int, overrides: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(compose("mnist_mlp", overrides.split()), Topology(0, num_ranks, 0, num_ranks))
    assert len(error.value.problems) == 1
    assert message in error.value.problems[0]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_model_that_cannot_be_cut_is_refused_by_all_ranks(framework: str, tmp_path: Path) -> None:
    recipe = f"linear_regression_{framework}"
    job = horovodrun(2, "-m", f"recipes.{recipe}", f"run.dir={tmp_path / 'run'}", "parallel=pipeline")
    assert job.returncode == 2
    assert "parallel.pipeline_stages=2" in job.stdout
    assert "the model has 1 layers with weights" in job.stdout
    assert "Traceback" not in job.stdout
    assert not (tmp_path / "run").exists()


def test_the_commands_of_the_page_are_valid() -> None:
    text = (ROOT / "docs/parallelism.md").read_text()
    commands = re.findall(r"^    horovodrun -np (\d) python -m recipes\.(\w+)_(?:torch|tf) (.*)$", text, re.M)
    assert len(commands) == 4
    for num_ranks, task, overrides in commands:
        validate(compose(task, overrides.split()), Topology(0, int(num_ranks), 0, int(num_ranks)))

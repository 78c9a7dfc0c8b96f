"""What is refused, and with which message; all that needs no launch."""

from pathlib import Path

from common.config.composition import compose
from common.config.validation import validate
from common.distributed.topology import Topology
from common.errors import ConfigError

import pytest


def check(num_ranks: int, task: str, *overrides: str) -> None:
    validate(compose(task, overrides), Topology(0, num_ranks, 0, num_ranks))


ASYNC = "parallel=parameter_server parallel.mode=async"
# Task, number of ranks, overrides, and how the one message begins.
MISTAKES = [
    ("mnist_mlp", 2, "optimizer.lr=-0.1", "optimizer.lr=-0.1: must be greater than 0"),
    ("mnist_mlp", 2, "optimizer.lr=nan", "optimizer.lr=nan: must be a finite number"),
    ("mnist_mlp", 2, "optimizer.momentum=1", "optimizer.momentum=1.0: must be below 1"),
    ("mnist_mlp", 2, "train.max_steps=0", "train.max_steps=0: must be at least 1, or null"),
    ("mnist_mlp", 2, "train.global_batch_size=1", "train.global_batch_size=1: must be at least the number of ranks, 2"),
    ("mnist_mlp", 2, "train.global_batch_size=0", "train.global_batch_size=0: must be at least 1"),
    (
        *("mnist_mlp", 2, "parallel.num_micro_batches=33"),
        "parallel.num_micro_batches=33: must be at most the examples of one rank in one step, 32",
    ),
    ("mnist_mlp", 2, "model.hidden_sizes=[]", "model.hidden_sizes=[]: must be one or more sizes"),
    ("mnist_mlp", 2, "run.dir=", "run.dir=: must name a folder"),
    (
        *("mnist_mlp", 2, "resume=/no/where"),
        "resume=/no/where: there is no such checkpoint or run; choose auto|never",
    ),
    (
        *("mnist_mlp", 2, "resume.allow_changes=[optimiser]"),
        "resume.allow_changes=optimiser: no such key or group",
    ),
    ("mnist_mlp", 2, "train.checkpoint_every=-1", "train.checkpoint_every=-1: must be at least 0"),
    (
        *("mnist_mlp", 2, "train.batch_schedule=steps"),
        "train.batch_growth_steps=[]: must be ascending steps",
    ),
    (
        *("mnist_mlp", 2, "train.batch_growth_steps=[5]"),
        "train.batch_growth_steps=[5]: must be ascending steps",
    ),
    (
        *("mnist_mlp", 2, "train.max_batch_size=32"),
        "train.max_batch_size=32: must be 0 or at least train.global_batch_size",
    ),
    (
        *("mnist_mlp", 1, "train.batch_schedule=noise_scale"),
        "train.batch_schedule=noise_scale: compares the gradients of ranks, and there is one",
    ),
    ("mnist_mlp", 2, "data.max_shift=15", "data.max_shift=15: must be at most 14"),
    ("mnist_mlp", 2, "data.max_rotation=181", "data.max_rotation=181.0: must be at most 180"),
    ("mnist_mlp", 2, "data=mnist data.root=/no/folder", "data.root=/no/folder: there is no such folder"),
    ("mnist_cnn", 2, "model.channels=[12]", "model.channels=[12]: must be one to four multiples of 8"),
    ("transformer_lm", 2, "model.num_heads=3", "model.num_heads=3: must divide model.width=128"),
    ("transformer_lm", 2, "model.context=0", "model.context=0: must be at least 1"),
    ("linear_regression", 2, "data.noise=-1", "data.noise=-1.0: must be at least 0"),
    # Keys that do not suit each other.
    (
        *("mnist_mlp", 2, "compression=dgc compression.momentum=0.9"),
        "optimizer.momentum=0.9: dgc has a velocity of its own in its place",
    ),
    (
        *("mnist_mlp", 2, "compression=dgc compression.start_step=5"),
        "compression.start_step=5: the steps before would have no momentum",
    ),
    (
        *("mnist_mlp", 2, "compression=fp16 precision=fp16"),
        "compression=fp16: with precision=fp16 gradients have been unscaled",
    ),
    (
        *("mnist_mlp", 2, "compression=topk compression.two_level=true"),
        "compression.two_level=true: all ranks are on one host",
    ),
    (
        *("mnist_mlp", 2, "compression=topk train.batch_schedule=noise_scale"),
        "compression=topk: train.batch_schedule=noise_scale compares",
    ),
    (
        *("mnist_mlp", 2, "train.reproducible=true train.lanes=1"),
        "train.lanes=1: must be at least the number of ranks, 2",
    ),
    (
        *("mnist_mlp", 2, "train.reproducible=true train.lanes=65"),
        "train.lanes=65: must be at least the number of ranks, 2, and at most train.global_batch_size=64",
    ),
    (
        *("mnist_mlp", 2, "train.reproducible=true parallel.num_micro_batches=5"),
        "parallel.num_micro_batches=5: with train.reproducible=true",
    ),
    ("mnist_mlp", 2, "train.reproducible=true compression=auto", "compression=auto: would choose by measurements"),
    (
        *("mnist_mlp", 2, "train.reproducible=true compression=int8 compression.health=true"),
        "compression.two_level and health: depend on ranks",
    ),
    ("mnist_mlp", 2, "train.reproducible=true op=adasum", "train.reproducible=true: goes with op=average"),
    ("mnist_mlp", 2, "train.reproducible=true optimizer.sharded=true", "optimizer.sharded=true: cuts the weights"),
    ("mnist_mlp", 2, "train.reproducible=true parallel=pipeline", "train.reproducible=true: goes with parallel=data"),
    # Layouts.
    (
        *("mnist_mlp", 3, "parallel=pipeline"),
        "parallel.pipeline_stages=2: must divide the number of ranks, 3",
    ),
    (
        *("mnist_mlp", 4, "parallel=pipeline parallel.replicas_per_stage=[1,2]"),
        "parallel.replicas_per_stage=[1,2]: must be one number for",
    ),
    (
        *("mnist_mlp", 2, "parallel=pipeline parallel.num_micro_batches=5"),
        "parallel.num_micro_batches=5: must divide the examples of one",
    ),
    (
        *("mnist_mlp", 2, "parallel=pipeline parallel.schedule=zigzag"),
        "parallel.schedule=zigzag: must be one of gpipe|1f1b",
    ),
    (
        *("mnist_mlp", 2, "parallel=pipeline parallel.schedule=interleaved"),
        "parallel.virtual_stages_per_rank=1: must be at least 2 with schedule",
    ),
    ("mnist_mlp", 2, "parallel=pipeline compression=auto", "compression=auto: measures parallel=data"),
    ("mnist_mlp", 2, "parallel=pipeline op=adasum", "op=adasum: goes with parallel=data, not pipeline"),
    (
        *("mnist_mlp", 2, "parallel=parameter_server parallel.num_servers=2"),
        "parallel.num_servers=2: must be at least 1 and leave",
    ),
    (
        *("mnist_mlp", 2, "parallel=parameter_server parallel.max_staleness=2"),
        "parallel.max_staleness=2: goes with parallel.mode=async",
    ),
    (
        *("mnist_mlp", 2, "parallel=parameter_server compression=powersgd"),
        "compression=powersgd: is made for sums over all ranks",
    ),
    ("mnist_mlp", 2, f"{ASYNC} optimizer.sharded=true", "optimizer.sharded=true: goes with parallel"),
    ("mnist_mlp", 2, f"{ASYNC} train.on_nonfinite=skip", "train.on_nonfinite=skip: all ranks skip the same step"),
    ("mnist_mlp", 2, f"{ASYNC} precision=fp16", "precision=fp16: all ranks skip the same"),
]


@pytest.mark.parametrize(("task", "num_ranks", "overrides", "message"), MISTAKES)
def test_a_mistake_has_its_message(task: str, num_ranks: int, overrides: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(num_ranks, task, *overrides.split())
    (problem,) = error.value.problems
    assert problem.startswith(message)


def test_an_elastic_run_may_shrink_to_one_rank_while_its_batch_grows() -> None:
    check(1, "mnist_mlp", "train.batch_schedule=noise_scale", "elastic=true")


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        check(2, "mnist_mlp", "optimizer.lr=-0.1", "train.epochs=0")
    assert {problem.partition(":")[0] for problem in error.value.problems} == {"optimizer.lr=-0.1", "train.epochs=0"}


def test_the_noise_scale_is_of_two_ranks_or_more() -> None:
    check(2, "mnist_mlp", "train.batch_schedule=noise_scale")


def test_a_run_folder_must_be_unfinished_and_writable(tmp_path: Path) -> None:
    (tmp_path / "summary.json").touch()
    (tmp_path / "file").touch()
    for folder, message in ((tmp_path, "holds a finished run"), (tmp_path / "file", "not a writable folder")):
        with pytest.raises(ConfigError, match=message):
            check(2, "mnist_mlp", f"run.dir={folder}")
    check(2, "mnist_mlp", f"run.dir={tmp_path / 'new'}")

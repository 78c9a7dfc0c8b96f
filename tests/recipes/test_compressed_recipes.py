"""Compressed gradients in recipes, from the command line."""

import json
import re
import shutil
from pathlib import Path
from types import ModuleType

from common.config.composition import compose
from common.config.validation import validate
from common.distributed.topology import Topology
from common.training.checkpoint_files import newest
from tests.helpers.launch import FRAMEWORKS, ROOT, horovodrun, read_events
from tests.helpers.ranks import Publish, Published
from tests.helpers.runs import COMMON, SHORT_RUNS, SMALL, losses, train_here

import numpy as np
import pytest

STEPS = ["train.max_steps=20", "train.log_every=1"]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_compressor_of_the_documentation_trains(framework: str, tmp_path: Path) -> None:
    for folder in ("common", "conf", "recipes"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    files = re.findall(r"^`(\S+)`\n\n```\w+\n(.*?)^```$", (ROOT / "docs/compression.md").read_text(), re.M | re.S)
    assert len(files) == 3
    for path, content in files:
        (tmp_path / path).write_text(content)
    overrides = ["compression=block_mean", "compression.options.size=2", "compression.min_numel=0", *STEPS]
    job = horovodrun(2, "-m", f"recipes.mnist_mlp_{framework}", "run.dir=out", *overrides, cwd=tmp_path)
    assert job.returncode == 0, job.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["wire_bytes_per_step"] == pytest.approx(summary["dense_bytes_per_step"] / 2, rel=1e-4)
    curve = losses(read_events(tmp_path / "out"))
    assert curve[20] < 0.9 * curve[1]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_two_levels_compress_between_hosts(framework: str, tmp_path: Path, published: Published) -> None:
    # Two names of this machine are two hosts to Horovod.
    hosts = ["-H", "localhost:2,127.0.0.1:2"]
    # With error feedback each rank clips its part, and the curve is another.
    overrides = ["compression=int8", "compression.error_feedback=false", "compression.two_level=true"]
    command = ["-m", f"recipes.mnist_mlp_{framework}", f"run.dir={tmp_path}", *SMALL["mnist_mlp"], *COMMON, *overrides]
    job = horovodrun(4, *command, options=hosts)
    assert job.returncode == 0, job.stdout
    plain = losses(read_events(published(framework, 4, SHORT_RUNS) / "mnist_mlp"))
    assert losses(read_events(tmp_path)) == pytest.approx(plain, rel=0.02)
    bucket = json.loads((tmp_path / "summary.json").read_text())["buckets"][0]
    piece = 8 * -(-bucket["num_values"] // 2 // 8)
    between_hosts = 2 * (piece + 4 * -(-piece // 1024))
    assert bucket["wire_bytes_per_step"] == pytest.approx(2 * 4 * bucket["num_values"] + between_hosts, abs=16)


# What a rank clips depends on their number.
RESIDUALS = [*SMALL["mnist_mlp"], "compression=topk", "train.clip_norm=0", "train.log_every=1"]


@pytest.mark.ranks(2)
def test_a_run_leaves_residuals(framework: str, publish: Publish) -> None:
    train_here(framework, "mnist_mlp", publish("residuals"), *RESIDUALS, "train.max_steps=10")


@pytest.mark.ranks(1, 4, after=2)
def test_a_run_goes_on_with_residuals(framework: str, publish: Publish, published: Published) -> None:
    start = f"resume={published(framework, 2, 'residuals')}"
    changes = ["train.max_steps=11", "resume.allow_changes=[train.max_steps]"]
    train_here(framework, "mnist_mlp", publish("residuals"), *RESIDUALS, *changes, start)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_residuals_go_on_at_another_number_of_ranks(framework: str, published: Published) -> None:
    start, one, four = (newest(published(framework, num_ranks, "residuals"))[0] for num_ranks in (2, 1, 4))
    assert start is not None
    (name,) = (name for name in start.gradients if name.startswith("1.weight"))
    assert np.abs(start.gradients[name]).sum() > 0
    sums = []
    for checkpoint in (one, four):
        assert checkpoint is not None
        # What the optimizer was given and what is left add up to the old residual and the same new gradient.
        given = checkpoint.optimizer_state["1.weight.momentum"] - 0.9 * start.optimizer_state["1.weight.momentum"]
        sums.append(given + checkpoint.gradients[name])
    np.testing.assert_allclose(sums[0], sums[1], atol=1e-6)


@pytest.mark.ranks(2)
def test_auto_says_what_it_measured_and_goes_on_with_its_choice(
    framework: str, runtime: ModuleType, shared_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    is_first = runtime.init().rank == 0
    fixed = [*SMALL["mnist_mlp"], "compression=auto", "compression.min_gain=0.99", *STEPS[1:]]
    candidates = "compression.candidates=[sign,none]"
    train_here(framework, "mnist_mlp", shared_path, *fixed, candidates, "train.max_steps=3")
    said = capsys.readouterr().out
    for part in ("compression=auto: latency", "sign       step", "none       step", "compression=sign: no other saves"):
        assert (part in said) == is_first
    assert "name: sign" in (shared_path / "config.yaml").read_text()
    runtime.broadcast_object(None)
    # By a new measurement it would now take the other one.
    (shared_path / "summary.json").unlink(missing_ok=True)
    runtime.broadcast_object(None)
    more = ["train.max_steps=5", "resume.allow_changes=[train.max_steps]"]
    curve = train_here(framework, "mnist_mlp", shared_path, *fixed, "compression.candidates=[none,sign]", *more)
    assert "latency" not in capsys.readouterr().out
    assert "name: sign" in (shared_path / "config.yaml").read_text()
    assert list(curve) == [1, 2, 3, 4, 5]


@pytest.mark.ranks(2)
def test_auto_does_with_fewer_examples_than_a_rank_would_take(framework: str, shared_path: Path) -> None:
    few = ["data.num_examples=3", "compression=auto", "compression.candidates=[none,int8]", "train.epochs=2"]
    assert len(train_here(framework, "linear_regression", shared_path / "run", *few, "train.log_every=1")) == 2


@pytest.mark.ranks(2)
def test_dgc_on_weights_that_are_too_small_for_it_is_plain_training(framework: str, shared_path: Path) -> None:
    overrides = ["train.epochs=4", "optimizer=sgd", "optimizer.lr=0.02", "train.log_every=1"]
    plain, dgc = (
        train_here(framework, "linear_regression", shared_path / name, *overrides, f"compression={name}")
        for name in ("none", "dgc")
    )
    assert dgc == plain


def test_the_commands_of_the_page_are_known() -> None:
    text = (ROOT / "docs/compression.md").read_text()
    commands = re.findall(r"^    horovodrun -np \d python -m (recipes\.\S+) (.*)$", text, re.M)
    assert len(commands) >= 4
    for module, overrides in commands[:-1]:  # the last one is run above
        validate(compose(module.partition(".")[2].rpartition("_")[0], overrides.split()), Topology(0, 2, 0, 2))

"""The recipes as a user starts them."""

import gzip
import importlib
import json
import shutil
import signal
import sys
from pathlib import Path
from types import ModuleType

from common.config.composition import compose
from common.config.schema import MnistMLPConfig
from common.data import example_log
from common.data.datasets import digits, mnist
from common.errors import ConfigError, TrainingError
from common.training import checkpoint_files
from recipes.commands import shard_data
from tests.helpers.idx import write_idx
from tests.helpers.launch import FRAMEWORKS, horovodrun, kill_when, read_events, run
from tests.helpers.ranks import Publish, Published
from tests.helpers.runs import COMMON, SHORT_RUNS, SMALL, TASKS, losses, train_here

import numpy as np
import pytest

# Runs that are made on every number of ranks: task, overrides, number of steps.
RUNS = {
    **{task: (task, overrides, 36) for task, overrides in SMALL.items()},
    # No number of ranks divides its batches.
    "mnist_cnn": ("mnist_cnn", [*SMALL["mnist_cnn"], "seed=7", "train.global_batch_size=53"], 24),
    "mnist_mlp with a full bucket": (
        "mnist_mlp",
        ["seed=5", "model.hidden_sizes=[8000]", "train.global_batch_size=50", "lr_schedule=constant"],
        8,
    ),
}
RECIPES = [f"{task}_{framework}" for task in TASKS for framework in FRAMEWORKS]
MLPS = [f"mnist_mlp_{framework}" for framework in FRAMEWORKS]
RANKS = (1, 2, 3, 4)


@pytest.mark.ranks(*RANKS)
@pytest.mark.parametrize("name", RUNS)
def test_a_short_run(framework: str, name: str, publish: Publish) -> None:
    """Other tests compare its losses with those of theirs."""
    folder = publish(SHORT_RUNS) / name
    task, overrides, num_steps = RUNS[name]
    overrides = [*overrides, *COMMON, f"train.max_steps={num_steps}", "data.ledger=true"]
    curve = train_here(framework, task, folder, *overrides)
    assert list(curve) == list(range(1, num_steps + 1))
    assert curve[num_steps] < 0.9 * curve[1]
    for is_right, line in example_log.check(folder):
        assert is_right, line


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_one_loss_curve_for_every_number_of_ranks(framework: str, name: str, published: Published) -> None:
    one, *others = (losses(read_events(published(framework, num_ranks, SHORT_RUNS) / name)) for num_ranks in RANKS)
    for other in others:
        assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("task", TASKS)
def test_micro_batches_leave_the_curve_as_it_is(framework: str, task: str, shared_path: Path) -> None:
    # With 359 a step the last one of the digits' epoch has one example, and most parts of it have none.
    size = ["train.global_batch_size=359"] if task == "mnist_cnn" else []
    whole, cut = (
        train_here(
            framework,
            task,
            shared_path / f"{task}{parts}",
            *SMALL[task],
            *COMMON,
            *size,
            "train.max_steps=6",
            f"parallel.num_micro_batches={parts}",
        )
        for parts in (1, 4)
    )
    assert cut == pytest.approx(whole, rel=1e-5)


# The other task of each framework goes on in tests/parallel/test_layouts.py.
@pytest.mark.parametrize(("framework", "task"), [*zip(FRAMEWORKS, ["transformer_lm", "mnist_mlp"], strict=False)])
def test_a_killed_job_goes_on_at_another_number_of_ranks(
    framework: str, task: str, tmp_path: Path, published: Published
) -> None:
    overrides = [*SMALL[task], *COMMON, f"run.dir={tmp_path}", "train.checkpoint_every=5", "data.ledger=true"]
    command = ["-m", f"recipes.{task}_{framework}", *overrides]
    kill_when(lambda: any(event["step"] > 12 for event in read_events(tmp_path)), 2, *command)
    assert (tmp_path / "checkpoints/step-00000010").is_dir()
    assert not (tmp_path / "summary.json").exists()
    job = horovodrun(3, *command)
    assert job.returncode == 0, job.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["resumed_from_step"] >= 10
    whole = losses(read_events(published(framework, 1, SHORT_RUNS) / task))
    assert losses(read_events(tmp_path)) == pytest.approx(whole, rel=1e-5)
    for is_right, line in example_log.check(tmp_path):
        assert is_right, line


# A calm warm-up: with steps that are large for Adam's first moments, rounding alone grows to more than 1e-4.
TWINS = {"mnist_mlp": 1e-4, "mnist_cnn": 1e-3, "transformer_lm": 1e-4}
OF_TWINS = ["train.max_steps=52", "train.log_every=1", "lr_schedule.warmup_steps=50"]


@pytest.mark.ranks(2, framework="torch")
@pytest.mark.parametrize("task", TWINS)
def test_the_first_twin_trains(task: str, publish: Publish) -> None:
    saving = ("train.checkpoint_every=1", "train.keep_checkpoints=99")
    train_here("torch", task, publish("twins") / task, *SMALL[task], *OF_TWINS, *saving)


@pytest.mark.ranks(2, framework="tf", after=("torch", 2))
@pytest.mark.parametrize("task", TWINS)
def test_the_second_twin_goes_on_with_the_same_curve(task: str, shared_path: Path, published: Published) -> None:
    first = published("torch", 2, "twins") / task
    torch = losses(read_events(first))
    start = f"resume={first}/checkpoints/step-00000002"
    tf = train_here("tf", task, shared_path / task, *SMALL[task], *OF_TWINS, start)
    assert list(tf) == list(range(3, 53))
    assert tf == pytest.approx({step: torch[step] for step in tf}, rel=TWINS[task])


@pytest.mark.ranks(3)
def test_gradient_descent_finds_the_least_squares_solution(framework: str, shared_path: Path) -> None:
    train_here(framework, "linear_regression", shared_path / "run")
    assert read_events(shared_path / "run")[-1]["test_distance"] < 1e-6


@pytest.mark.parametrize("recipe", MLPS)
def test_sigterm_leaves_a_checkpoint_and_its_status(recipe: str, tmp_path: Path) -> None:
    command = ["-m", f"recipes.{recipe}", f"run.dir={tmp_path}", "train.epochs=1000", "train.log_every=1"]
    job = kill_when(lambda: len(read_events(tmp_path)) > 5, 2, *command, signal_number=signal.SIGTERM)
    assert job.returncode == 143, job.stdout
    assert job.stdout.count("as asked by a signal; the same command with run.dir=") == 1
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert f"stopped at step {int(saved.name[-8:])}," in job.stdout


@pytest.mark.ranks(2)
def test_the_batch_grows_alike_on_all_ranks(framework: str, shared_path: Path) -> None:
    growing = ("train.batch_schedule=noise_scale", "train.global_batch_size=8", "train.max_batch_size=64")
    train_here(framework, "mnist_mlp", shared_path / "run", *growing, "train.epochs=3", "train.log_every=10")
    events = read_events(shared_path / "run")
    sizes = [event["batch_size"] for event in events if "batch_size" in event]
    assert sizes[0] == 8
    assert sizes[-1] > 8
    assert events[-1]["test_accuracy"] > 0.85


@pytest.mark.ranks(2)
def test_in_fp64_nothing_but_rounding_is_left(framework: str, shared_path: Path) -> None:
    common = ("precision=fp64", "train.max_steps=30", "train.log_every=5")
    whole = train_here(framework, "mnist_mlp", shared_path / "whole", *common)
    cut = train_here(framework, "mnist_mlp", shared_path / "cut", *common, "parallel.num_micro_batches=4")
    assert cut == pytest.approx(whole, rel=1e-9)


@pytest.mark.ranks(2)
def test_a_run_without_averaging_is_caught(
    framework: str, runtime: ModuleType, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if framework == "torch":
        from common.torch.gradients.bucket_exchange import BucketExchange
        from recipes.mnist_mlp_torch import train

        monkeypatch.setattr(BucketExchange, "_send", lambda self, number: None)
    else:
        from common.tf.gradients.compression import Dense
        from recipes.mnist_mlp_tf import train

        monkeypatch.setattr(Dense, "exchange", lambda self, values, step: self.exchanged(values, values))
    folders = {name: shared_path / name for name in ("broken", "sound")}
    cfg = compose("mnist_mlp", ["train.max_steps=3", "train.log_every=1", f"run.dir={folders['broken']}"])
    assert isinstance(cfg, MnistMLPConfig)
    with pytest.raises(TrainingError, match=r"ranks \[1\] hold other weights than rank 0"):
        train(cfg)
    monkeypatch.undo()
    cfg.run.dir = str(folders["sound"])
    assert train(cfg)["completed"]
    broken, sound = (losses(read_events(folder)) for folder in folders.values())
    assert broken[3] != pytest.approx(sound[3], rel=1e-5)


@pytest.mark.ranks(2)
def test_idx_files_train_and_the_defaults_reach_their_accuracy(
    framework: str, runtime: ModuleType, shared_path: Path
) -> None:
    if runtime.init().rank == 0:
        for prefix, split in zip(("train", "t10k"), digits.load(), strict=True):
            write_idx(shared_path / f"{prefix}-images-idx3-ubyte.gz", split.images[:])
            write_idx(shared_path / f"{prefix}-labels-idx1-ubyte.gz", split.classes[:])
    runtime.broadcast_object(None)
    train_here(framework, "mnist_mlp", shared_path / "run", "data=mnist", f"data.root={shared_path}")
    assert read_events(shared_path / "run")[-1]["test_accuracy"] >= 0.95


# Overrides that cannot be run for what files hold -> parts of the message; braces hold a path that unusable() makes.
# What is wrong with keys alone is in tests/config/test_validation.py.
MISTAKES = {
    "data=mnist data.root={folder}": ["train-images-idx3-ubyte.gz is damaged", "get the file again"],
    "run.dir={finished}": ["holds a finished run", "choose another folder"],
    f"run.dir={'x' * 300}": ["File name too long; choose a path that can be used"],
    "data=image_shards data.path={flipped}": ["train-images-00000.bin", "SHA-256"],
    "data=image_shards data.path={missing}": ["train-images-00000.bin"],
    "data=image_shards data.path={foreign}": ["train-images-00000.bin"],
    "resume={cut}": ["step-00000002: is no sound checkpoint: weights.safetensors was cut off"],
    "resume={other}": ["is a checkpoint of mnist_cnn, not of mnist_mlp"],
}


def unusable(folder: Path) -> dict[str, Path]:
    """Folders that cannot be used, by what is wrong with them."""
    shards, checkpoints = shards_of_digits(folder), checkpoint_folders(folder)
    (folder / "finished").mkdir()
    (folder / "finished" / "summary.json").touch()
    for name in mnist.FILES:
        (folder / f"{name}.gz").write_bytes(gzip.compress(b"\x00" * 100)[:30])
    return {**shards, **checkpoints, "folder": folder, "finished": folder / "finished"}


def shards_of_digits(folder: Path) -> dict[str, Path]:
    """Shards that are damaged in several ways."""
    train_split, test_split = digits.load()
    for name, size in (("sound", 600), ("others", 500)):
        files = folder / f"{name}.idx"
        files.mkdir()
        for prefix, split in (("train", train_split), ("t10k", test_split)):
            write_idx(files / f"{prefix}-images-idx3-ubyte", split.images[:][:size])
            write_idx(files / f"{prefix}-labels-idx1-ubyte", split.classes[:][:size])
        shard_data.main(["source=idx", f"path={files}", f"out={folder / name}"])
    damaged = {how: folder / how for how in ("flipped", "missing", "foreign")}
    for how, path in damaged.items():
        shutil.copytree(folder / "sound", path)
        shard = path / "train-images-00000.bin"
        if how == "flipped":
            content = bytearray(shard.read_bytes())
            content[1000] ^= 1
            shard.write_bytes(content)
        elif how == "missing":
            shard.unlink()
        else:
            shutil.copy(folder / "others" / "index.json", path)
    return damaged


def checkpoint_folders(folder: Path) -> dict[str, Path]:
    """A checkpoint that is cut off, and one of another task."""
    state = {
        **{"task": "mnist_cnn", "framework": "torch", "fingerprint": "", "config": {"optimizer": {"name": "sgd"}}},
        "position": {"step": 2, "epoch": 1, "offset": 0},
        "batch_sizes": {"changes": [[1, 64]], "noise": 0.0, "signal": 0.0},
    }
    folders = {name: folder / name / "step-00000002" for name in ("cut", "other")}
    for path in folders.values():
        checkpoint_files.write(path, {"0.weight": np.zeros(3)}, {}, {}, state)
    weights = folders["cut"] / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    return folders


@pytest.mark.ranks(2)
def test_what_files_hold_is_refused_with_one_message_by_all_ranks(
    framework: str, runtime: ModuleType, shared_path: Path
) -> None:
    folders = runtime.broadcast_object(
        {name: str(path) for name, path in unusable(shared_path).items()} if runtime.init().rank == 0 else None
    )
    before = sorted(shared_path.rglob("*"))
    for mistake, message in MISTAKES.items():
        overrides = [f"run.dir={shared_path / 'run'}", *mistake.format(**folders).split()]
        with pytest.raises(ConfigError) as error:
            importlib.import_module(f"recipes.mnist_mlp_{framework}").train(compose("mnist_mlp", overrides))
        for part in message:
            assert str(error.value).count(part) == 1
        assert set(runtime.allgather_object(str(error.value))) == {str(error.value)}
        assert sorted(shared_path.rglob("*")) == before


# One that is found before the ranks are asked, and one that is found by each of them.
@pytest.mark.parametrize(
    ("recipe", "mistake", "message"),
    [
        (MLPS[0], "train.epoch=3", "train.epoch=3: no such key; did you mean train.epochs?"),
        (MLPS[-1], "data=mnist data.root={folder}", "train-images-idx3-ubyte.gz is damaged"),
    ],
)
def test_a_mistake_has_one_message_and_status_2_on_every_rank(
    recipe: str, mistake: str, message: str, tmp_path: Path
) -> None:
    overrides = mistake.format(**unusable(tmp_path)).split()
    result = horovodrun(2, "-m", f"recipes.{recipe}", f"run.dir={tmp_path / 'run'}", *overrides, timeout=60)
    assert result.returncode == 2, result.stdout
    assert "Traceback" not in result.stdout
    spoken = [line for line in result.stdout.splitlines() if line.startswith("[")]
    assert all(line.startswith("[0]<stderr>:") for line in spoken), result.stdout
    assert result.stdout.count(message) == 1, result.stdout
    for rank in range(2):
        assert f"Process {rank} exit with status code 2." in result.stdout
    assert not (tmp_path / "run").exists()


def test_ranks_that_were_not_started_alike_are_told_apart(tmp_path: Path) -> None:
    differing = "seed=$HOROVOD_RANK train.max_steps=$((3 + HOROVOD_RANK)) run.dir=$0"
    script = f"{sys.executable} -m recipes.{MLPS[0]} {differing}"
    result = run(["horovodrun", "--gloo", "-np", "2", "sh", "-c", script, tmp_path / "run"], timeout=60)
    assert result.returncode == 2, result.stdout
    assert "seed: differs between ranks, which must be started alike (rank 0: 0; rank 1: 1)" in result.stdout
    assert "train.max_steps: differs between ranks" in result.stdout
    assert "Traceback" not in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", MLPS)
def test_another_launcher_is_told_how_to_start_it(recipe: str) -> None:
    env = {"WORLD_SIZE": "2", "RANK": "0"}
    result = run([sys.executable, "-m", f"recipes.{recipe}", "train.epochs=1"], env=env)
    assert result.returncode == 2, result.stdout
    assert result.stdout.rstrip().endswith(f"horovodrun -np 2 python -m recipes.{recipe} train.epochs=1")


@pytest.mark.ranks(2)
def test_a_run_that_is_resumed_at_its_end_is_completed(framework: str, shared_path: Path) -> None:
    recipe = importlib.import_module(f"recipes.mnist_mlp_{framework}")
    overrides = ["model.hidden_sizes=[32]", "train.epochs=1", "train.global_batch_size=400"]
    whole = recipe.train(compose("mnist_mlp", [*overrides, f"run.dir={shared_path / 'whole'}"]))
    importlib.import_module(f"common.{framework}.distributed.runtime").broadcast_object(None)
    (shared_path / "whole" / "summary.json").unlink(missing_ok=True)  # as if it had been killed before the last line
    importlib.import_module(f"common.{framework}.distributed.runtime").broadcast_object(None)
    again = recipe.train(compose("mnist_mlp", [*overrides, f"run.dir={shared_path / 'whole'}"]))
    for name in ("steps", "weights_sha256", "test_accuracy", "completed"):
        assert again[name] == whole[name]
    source = f"resume={shared_path / 'whole'}"
    copy = recipe.train(compose("mnist_mlp", [*overrides, source, f"run.dir={shared_path / 'copy'}"]))
    assert (copy["steps"], copy["examples"], copy["step_seconds_median"]) == (whole["steps"], 0, None)


# The status is the launcher's, whatever the framework.
@pytest.mark.parametrize(
    ("framework", "how", "status"),
    [(FRAMEWORKS[0], "raise", 1), *((framework, "kill", 137) for framework in FRAMEWORKS)],
)
def test_a_rank_that_fails_ends_the_job_with_its_status(framework: str, how: str, status: int) -> None:
    result = horovodrun(2, "-m", "tests.helpers.troubled_job", framework, how, timeout=40)
    assert result.returncode == status, result.stdout
    assert "rank 0 stops: another rank has left the job" in result.stdout
    assert ("ValueError: on purpose" in result.stdout) == (how == "raise")


def test_ranks_wait_for_one_that_fetches_data_longer_than_any_timeout() -> None:
    env = {"HOROVOD_GLOO_TIMEOUT_SECONDS": "1"}
    result = horovodrun(2, "-m", "tests.helpers.troubled_job", FRAMEWORKS[0], "late", timeout=40, env=env)
    assert result.returncode == 0, result.stdout

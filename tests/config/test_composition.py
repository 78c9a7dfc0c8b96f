"""Every shipped option composes; every mistake has its message."""

import shutil
from pathlib import Path

from common.config import composition, registry
from common.config.composition import CONF, compose, group_options
from common.config.validation import validate
from common.data import datasets
from common.distributed.topology import Topology
from common.errors import ConfigError
from common.training import lr_schedule
from tests.helpers.launch import ROOT

import pytest

TASKS = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "base")
OPTIONS = [
    (task, f"{group}={name}") for task in TASKS for group, names in group_options(task).items() for name in names
]
TWO_RANKS = Topology(0, 2, 0, 2)


@pytest.mark.parametrize(("task", "option"), OPTIONS)
def test_shipped_options_compose_and_are_valid(task: str, option: str) -> None:
    validate(compose(task, [option]), TWO_RANKS)


def test_every_shipped_option_is_for_some_task() -> None:
    shipped = {f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml")}
    assert shipped == {option for _, option in OPTIONS}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", "train.epoch=3: no such key; did you mean train.epochs? valid keys: train.epochs"),
        ("train.epochs=1.5", "train.epochs=1.5: wrong type"),
        ("optimizer.lr=fast", "optimizer.lr=fast: wrong type"),
        ("seed=null", "seed=null: wrong type"),
        ("data=mnits", "data=mnits: no such option; choose data=digits|image_shards|mnist"),
        ("precision.dtype=int8", "is set by choosing an option; write precision=int8"),
        ("+train.foo=1", "+train.foo=1: keys cannot be added or removed"),
        ("optimizer.name=adamw", "is set by choosing an option; write optimizer=adamw"),
        ("epochs", "epochs: not of the form key=value"),
        ("run.dir=a[b", "not of the form key=value; quote a value with special characters"),
        ("optimizer=null", "optimizer=null: no such option; choose optimizer=adamw|gradient_descent|sgd"),
        ("model=[1]", "model=[1]: no such option; choose model=mlp"),
        ("data.root=/x", "data.root=/x: no such key here; it goes with data=mnist"),
        ("optimizer.beta1=0.8", "no such key here; it goes with optimizer=adamw"),
        ("train.max_steps=none", "the default is train.max_steps=null"),
        ("hydra.run.dir=x", "hydra.run.dir=x: Hydra's own settings have no effect here"),
        ("train/epochs=3", "train/epochs=3: no such key; did you mean train.epochs?"),
        ("batch_size=32", "batch_size=32: no such key; did you mean train.global_batch_size?"),
        ("lr=0.1", "lr=0.1: no such key; did you mean optimizer.lr? --help lists all keys"),
        ("train.lr=0.1", "train.lr=0.1: no such key; did you mean optimizer.lr?"),
        ("train.learning_rate=0.1", "no such key; did you mean optimizer.lr?"),
        ("run.name=x", "run.name=x: no such key; did you mean run.dir?"),
        ("device=cuda", "device=cuda: the device is chosen by itself, a GPU where the framework sees one; there is no"),
        ("train.gpus=2", "train.gpus=2: the number of ranks is that of horovodrun -np"),
        ("--multirun", "--multirun: sweeps are not done by a recipe; start one job for each value"),
        ("--config-dir=x", "--config-dir=x: options are read from conf/ alone"),
        ("--info", "--info: --help prints the configuration"),
        ("--verbose", "--verbose: no such flag; keys are set with key=value, and --help lists them"),
    ],
)
def test_overrides_that_cannot_be_applied(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose("mnist_mlp", [override])
    assert message in str(error.value)


def test_the_value_of_a_flag_is_no_mistake_of_its_own() -> None:
    with pytest.raises(ConfigError) as error:
        compose("mnist_mlp", ["--cfg", "job", "-m", "optimizer.lr=0.1,0.2"])
    assert [problem.partition(":")[0] for problem in error.value.problems] == ["--cfg", "-m", "optimizer.lr=0.1,0.2"]


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of conf/ that is read instead of it."""
    shutil.copytree(CONF, tmp_path / "conf")
    monkeypatch.setattr(composition, "CONF", tmp_path / "conf")
    return tmp_path / "conf"


IMAGES = "ledger: false\nbalance: none\nmax_shift: 0\nmax_rotation: 0.0\n"
LOSSY = "error_feedback: true\nscope: bucket\nmin_numel: 1\nstart_step: 1\ntwo_level: false\nhealth: false\n"


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        (
            "data",
            f"defaults: [images_schema]\nname: x\n{IMAGES}",
            "name: x, for which there is no code; choose digits",
        ),
        ("data", f"defaults: [images_schema]\nname: mnist\n{IMAGES}", "which goes with defaults: [mnist_schema]"),
        (
            "data",
            f"defaults: [pictures]\nname: digits\n{IMAGES}",
            "no known schema in its defaults; choose one of im",
        ),
        ("data", "defaults: [", "must be YAML that begins with defaults: [SCHEMA] and name: NAME"),
        ("data", "name: digits", "must be YAML that begins with defaults: [SCHEMA] and name: NAME"),
        ("data", "", "must be YAML that begins with defaults: [SCHEMA] and name: NAME"),
        ("lr_schedule", "defaults: [constant_schema]\nname: linear\nwarmup_steps: 0", "choose constant|cosine"),
        ("lr_schedule", "defaults: [constant_schema]\nname: cosine\nwarmup_steps: 0", "defaults: [cosine_schema]"),
        ("optimizer", "defaults: [sgd_schema]\nname: lamb\nlr: 1\n", "choose adamw|gradient_descent|sgd"),
        ("optimizer", "defaults: [sgd_schema]\nname: adamw\nlr: 1\n", "which goes with defaults: [adamw_schema]"),
        (
            "precision",
            "defaults: [precision_schema]\nname: fp8\n",
            "there is no code; choose bf16|fp16|fp32|fp64",
        ),
        ("parallel", "defaults: [parallel_schema]\nname: tensor\n", "choose data|parameter_server|pipeline"),
        (
            "compression",
            f"defaults: [own_schema]\nname: mean\n{LOSSY}",
            "write common/<framework>/gradients/compressors/mean.py",
        ),
        ("compression", f"defaults: [lossy_schema]\nname: topk\n{LOSSY}", "which goes with defaults: [sparse_schema]"),
    ],
)
def test_an_option_without_code_is_refused_when_it_is_chosen(
    conf: Path, option: str, content: str, message: str
) -> None:
    (conf / option / "x.yaml").write_text(content)
    compose("mnist_mlp", ["optimizer=adamw"])
    assert "x" not in group_options("mnist_mlp")[option]
    with pytest.raises(ConfigError) as error:
        compose("mnist_mlp", [f"{option}=x"])
    (problem,) = error.value.problems
    assert problem.startswith(f"{option}=x: conf/{option}/x.yaml: ")
    assert message in problem
    assert "\n" not in problem


def test_an_option_without_code_is_refused_where_a_task_names_it(conf: Path) -> None:
    (conf / "lr_schedule" / "x.yaml").write_text("defaults: [constant_schema]\nname: x\nwarmup_steps: 0")
    task = conf / "linear_regression.yaml"
    task.write_text(task.read_text().replace("override lr_schedule: constant", "override lr_schedule: x"))
    with pytest.raises(ConfigError, match="lr_schedule=x: has name: x, for which there is no code"):
        compose("linear_regression", [])


def test_an_option_of_ones_own_has_its_values(conf: Path) -> None:
    own = (conf / "data" / "digits.yaml").read_text().replace("max_shift: 0", "max_shift: 3")
    (conf / "data" / "moved.yaml").write_text(own)
    (conf / "model" / "wide.yaml").write_text("defaults: [mlp_schema]\nname: wide\nhidden_sizes: [8]\ndropout: 0.0")
    cfg = compose("mnist_mlp", ["data=moved", "model=wide"])
    assert (cfg.data.name, cfg.data.max_shift, cfg.model.name) == ("digits", 3, "wide")  # type: ignore[attr-defined]


def test_all_overrides_that_cannot_be_applied_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        compose("mnist_mlp", ["train.epoch=3", "data=mnist", "data.root=folder", "seed=x", "optimizer=adam"])
    refused = {problem.partition(":")[0] for problem in error.value.problems}
    assert refused == {"train.epoch=3", "seed=x", "optimizer=adam"}


def test_every_registered_name_has_its_code() -> None:
    assert registry.NAMES["data"] == datasets.SOURCES
    assert registry.NAMES["lr_schedule"] == {name: kind for name, (kind, _) in lr_schedule.SCHEDULES.items()}
    for framework in ("torch", "tf"):
        modules = (ROOT / "common" / framework / "gradients" / "compressors").glob("[!_]*.py")
        assert {path.stem for path in modules} == registry.NAMES["compression"].keys() - {"none", "auto"}

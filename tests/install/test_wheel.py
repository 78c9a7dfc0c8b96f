"""An installed wheel is whole: nothing that it needs is in the checkout alone."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from common.config.composition import group_options
from tests.helpers.launch import FRAMEWORKS, ROOT, run

import pytest

PACKAGES = ("common", "recipes")
TASKS = sorted(path.stem for path in (ROOT / "conf").glob("*.yaml") if path.stem != "base")
# The environment has the project installed in place: a module that the wheel lacks could be found in the checkout.
REPORT = """
import json, sys
files = [module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] in ("common", "recipes")]
print(json.dumps([result, files]))
"""
COMPOSE = """
from common.config.composition import compose, group_options
result = {{task: group_options(task) for task in {tasks}}}
for task, groups in result.items():
    for group, names in groups.items():
        compose(task, [f"{{group}}={{names[-1]}}"])
"""
IMPORT = """
import importlib
result = {modules}
for name in result:
    importlib.import_module(name)
"""


def modules() -> list[str]:
    """The names of all modules of the checkout, but for those that run a program when they are imported."""
    paths = [path.relative_to(ROOT) for package in PACKAGES for path in sorted((ROOT / package).rglob("[!_]*.py"))]
    return [".".join(path.with_suffix("").parts) for path in paths]


def framework_of(module: str) -> str | None:
    """The framework that a module is for: common.torch.loop, recipes.mnist_mlp_torch."""
    return next((name for name in ("torch", "tf") if f".{name}." in module or module.endswith(f"_{name}")), None)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing but what a wheel of the checkout installs."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "target"))
    for folder in ("conf", *PACKAGES):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    options = ["--no-index", "--no-deps"]
    for command in (
        ["wheel", *options, "--no-build-isolation", "--wheel-dir", wheels, source],
        ["install", *options, "--no-compile", "--target", target, "--find-links", wheels, "horovod-recipes"],
    ):
        result = run([*pip, *command])
        assert result.returncode == 0, result.stdout
    return target


def in_empty_folder(installed: Path, folder: Path, code: str) -> Any:
    """The result of code that a new interpreter runs in the folder, with modules of the wheel only."""
    environment = {"PYTHONPATH": os.fspath(installed)}
    output = run([sys.executable, "-c", code + REPORT], env=environment, cwd=folder)
    assert output.returncode == 0, output.stdout
    result, files = json.loads(output.stdout.splitlines()[-1])
    assert files
    assert [file for file in files if not Path(file).is_relative_to(installed)] == []
    return result


def test_every_group_of_every_task_composes(installed: Path, tmp_path: Path) -> None:
    options = in_empty_folder(installed, tmp_path, COMPOSE.format(tasks=TASKS))
    assert options == {task: group_options(task) for task in TASKS}


@pytest.mark.parametrize("framework", [None, *FRAMEWORKS])
def test_every_module_is_there(framework: str | None, installed: Path, tmp_path: Path) -> None:
    names = [name for name in modules() if framework_of(name) == framework]
    assert names
    in_empty_folder(installed, tmp_path, IMPORT.format(modules=names))


def test_type_checkers_are_told_of_the_types(installed: Path) -> None:
    assert [package for package in PACKAGES if not (installed / package / "py.typed").is_file()] == []


def test_nothing_else_is_installed(installed: Path) -> None:
    others = [path.name for path in installed.iterdir() if path.suffix != ".dist-info"]
    assert sorted(others) == sorted(PACKAGES)

"""The commands of the README and of the recipes' docstrings do what they say."""

import re
import shlex
from pathlib import Path

from common.config.composition import compose
from common.config.validation import validate
from common.distributed.topology import Topology
from tests.helpers.launch import FRAMEWORKS, ROOT, run

import pytest


def commands(path: Path) -> list[str]:
    """The lines of a document that start recipes of installed frameworks."""
    lines = re.findall(r"^ *((?:horovodrun|python -m recipes)\b.*)$", prose(path), re.MULTILINE)
    return [line for line in lines if "recipes." not in line or re.search(f"_({'|'.join(FRAMEWORKS)})\\b", line)]


def prose(path: Path) -> str:
    """A document without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that commands of the README build on one after another."""
    return tmp_path_factory.mktemp("outputs")


@pytest.mark.parametrize("command", commands(ROOT / "README.md"))
def test_a_command_of_the_readme_runs(command: str, outputs: Path, tmp_path: Path) -> None:
    words = shlex.split(command, comments=True)
    # Two names of this host for two hosts; the digits for what would have to be fetched; a few steps only.
    words = [re.sub(r"^host1:\d,host2:\d$", "localhost:2,127.0.0.1:2", word) for word in words]
    words = [word.replace("=outputs/", f"={outputs}/") for word in words]
    words = [word for word in words if not word.startswith(("data=mnist", "data.root="))]
    if words[0] == "horovodrun" and "--help" not in words:
        folder = [] if any(word.startswith("run.dir=") for word in words) else [f"run.dir={tmp_path / 'run'}"]
        words += ["train.max_steps=2", *folder]
    result = run(words)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "recipes").glob("[!_]*.py")))
def test_the_commands_of_a_recipe_are_valid(recipe: str) -> None:
    task, _, framework = recipe.rpartition("_")
    documented = commands(ROOT / "recipes" / f"{recipe}.py")
    assert documented or framework not in FRAMEWORKS
    for command in documented:
        match = re.fullmatch(rf"horovodrun -np (\d) python -m recipes\.{recipe}(.*)", command)
        assert match, command
        num_ranks = int(match[1])
        validate(compose(task, shlex.split(match[2])), Topology(0, num_ranks, 0, num_ranks))


def test_the_readme_shows_a_recipe_whole() -> None:
    (shown,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert shown == (ROOT / "recipes/linear_regression_torch.py").read_text()


def test_every_make_target_in_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z]+)", prose(ROOT / "README.md")))
    assert named
    assert named <= targets


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md", "README.md"])
def test_files_that_a_page_names_exist(page: str) -> None:
    folders = "common|conf|recipes|tests|benchmarks|install|docs"
    named = re.findall(rf"\b(?:{folders})/[\w/.-]*\w\b", (ROOT / page).read_text())
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []

"""Who may import whom."""

import json
import sys
from pathlib import Path

from tests.helpers.launch import FRAMEWORKS, ROOT, run

import pytest

FOREIGN = "{'torch', 'tensorflow', 'keras', 'horovod'}"
NEUTRAL = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "common").rglob("[!_]*.py"))
    if not {"torch", "tf"} & set(path.parts)
]


def imported(statements: str, names: str) -> str:
    """Which of the names a new interpreter has imported after the statements."""
    result = run([sys.executable, "-c", f"{statements}\nimport sys\nprint(sorted({names} & sys.modules.keys()))"])
    assert result.returncode == 0, result.stdout
    return result.stdout.splitlines()[-1]


def test_neutral_modules_import_no_framework() -> None:
    assert imported(f"import {', '.join(NEUTRAL)}", FOREIGN) == "[]"


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_without_horovodrun_a_recipe_is_one_rank_and_knows_one_framework(framework: str, tmp_path: Path) -> None:
    recipe = f"mnist_mlp_{framework}"
    other = {"torch": "{'tensorflow', 'keras'}", "tf": "{'torch'}"}[framework]
    statements = f"""
import sys
from pathlib import Path
sys.argv = ["", "run.dir={tmp_path}", "train.max_steps=2", "optimizer=adamw", "precision=fp64", "model.dropout=0.5"]
from recipes import {recipe}
{recipe}.main()"""
    assert imported(statements, other) == "[]"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["world_size"], summary["steps"], summary["wire_bytes_per_step"]) == (1, 2, 0)


def test_a_missing_framework_is_named_with_its_extra() -> None:
    statements = "import sys; sys.modules['torch'] = None; import common.torch"
    result = run([sys.executable, "-c", statements])
    assert result.returncode == 2
    assert result.stdout.startswith("torch: not installed; it comes with the extra 'torch'")
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.parametrize("module", ["recipes", "recipes.mnist_mlp_torch"])
def test_another_python_is_told_to_activate_the_environment(module: str) -> None:
    result = run([sys.executable, "-S", "-m", module])  # -S: without the packages of .venv
    assert result.returncode == 2
    assert "activate the environment first: source .venv/bin/activate (make setup makes it)" in result.stdout
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.parametrize("words", [[], ["list"], ["help"], ["--help"], ["-h"]])
def test_the_list_of_recipes_has_a_line_for_each(words: list[str]) -> None:
    lines = run([sys.executable, "-m", "recipes", *words]).stdout.splitlines()
    names = [line.split()[0] for line in lines]
    tasks = ("linear_regression", "mnist_cnn", "mnist_mlp", "transformer_lm")
    assert names[:8] == [f"{task}_{framework}" for task in tasks for framework in ("tf", "torch")]
    assert {"check-ledger", "generate", "shard-data"} <= set(names[8:])
    assert lines[5].endswith("Handwritten digits with a multilayer perceptron, in PyTorch.")

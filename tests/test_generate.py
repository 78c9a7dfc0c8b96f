"""Text from checkpoints, by either framework."""

import sys
from pathlib import Path

from tests.conftest import Launches
from tests.launch import FRAMEWORKS, run

import pytest

PROMPT = "One loss"


def generate(folder: Path, *words: str) -> tuple[int, str]:
    result = run([sys.executable, "-m", "recipes", "generate", f"run.dir={folder}", *words])
    return result.returncode, result.stdout


@pytest.mark.parametrize("trained_by", FRAMEWORKS)
def test_either_framework_goes_on_with_the_same_text(trained_by: str, launches: Launches) -> None:
    folder = launches(trained_by, 2) / "test_a_short_run" / "transformer_lm"  # of tests/test_recipes.py
    arguments = (f"prompt={PROMPT}", "num_tokens=40", "temperature=0.8", "top_k=5", "seed=3")
    texts = {generate(folder, *arguments, f"framework={framework}") for framework in FRAMEWORKS}
    assert len(texts) == 1
    ((status, text),) = texts
    assert status == 0
    assert text.startswith(PROMPT)
    assert len(text) > len(PROMPT) + 20
    assert generate(folder, *arguments, "framework=" + FRAMEWORKS[0], "seed=4")[1] != text


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["run.dir=/no/run"], ["/no/run: has no sound checkpoint"]),
        (["run.dir=.", "prompt=", "temperature=-1"], ["prompt='': must be one character", "temperature=-1.0: must be"]),
        (["run.dir=.", "prompt=\udcff"], ["must be one character or more, in UTF-8"]),
        (["run.dir=.", "framework=jax"], ["framework=jax: must be torch|tf, and installed"]),
        (["run.dir=.", "tokens=3"], ["tokens=3: no such key; valid keys: run.dir, prompt, num_tokens"]),
        (["run.dir=.", "num_tokens=many"], ["num_tokens=many: wrong type"]),
        ([], ["run.dir=: must be given"]),
    ],
)
def test_a_mistake_has_one_message_and_status_2(words: list[str], messages: list[str]) -> None:
    result = run([sys.executable, "-m", "recipes", "generate", *words])
    assert result.returncode == 2, result.stdout
    assert "Traceback" not in result.stdout
    for message in messages:
        assert message in result.stdout


def test_an_unknown_command_is_named() -> None:
    result = run([sys.executable, "-m", "recipes", "generat"])
    assert (result.returncode, "generat: no such command; choose check-ledger|generate" in result.stdout) == (2, True)

"""Text from checkpoints, by either framework."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from common.errors import ConfigError
from common.training.checkpoint_files import read
from recipes.commands.generate import main
from tests.helpers.fuzz_job import of_checkpoint
from tests.helpers.launch import FRAMEWORKS, run
from tests.helpers.ranks import Published
from tests.helpers.runs import SHORT_RUNS

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

PROMPT = "One loss"
Change: TypeAlias = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize("trained_by", FRAMEWORKS)
def test_either_framework_goes_on_with_the_same_text(
    trained_by: str, published: Published, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = published(trained_by, 2, SHORT_RUNS) / "transformer_lm"

    def generated(*words: str) -> str:
        main([f"run.dir={folder}", f"prompt={PROMPT}", "num_tokens=40", "temperature=0.8", "top_k=5", *words])
        return capsys.readouterr().out

    (text,) = {generated("seed=3", f"framework={framework}") for framework in FRAMEWORKS}
    assert text.startswith(PROMPT)
    assert len(text) > len(PROMPT) + 20
    assert generated("seed=4", f"framework={FRAMEWORKS[0]}") != text


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
def test_a_mistake_has_its_message(words: list[str], messages: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        main(words)
    for message in messages:
        assert message in str(error.value)


def without(key: str) -> Change:
    return lambda state: state.pop(key)


def larger(key: str, value: object) -> Change:
    return lambda state: state["config"]["model"].update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("tokenizer"), "no tokenizer: TypeError"),
        (without("config"), "state.json lacks 'config', or has it in another form"),
        (lambda state: state.update(task=["x"]), "state.json lacks 'task'"),
        (lambda state: state.update(position="x"), "state.json lacks 'position'"),
        (lambda state: state["position"].update(epoch=0), "state.json lacks 'position'"),
        (lambda state: state["position"].update(offset=True), "state.json lacks 'position'"),
        (lambda state: state["batch_sizes"].update(changes=[]), "state.json lacks 'batch_sizes'"),
        (lambda state: state["config"].update(optimizer=3), "state.json lacks 'config'"),
        (lambda state: state["config"].update(model=None), "its model's sizes are not those of its weights"),
        (larger("context", 1 << 40), "its model's sizes are not those of its weights"),
        (larger("num_layers", 1 << 40), "its model's sizes are not those of its weights"),
        (larger("num_heads", 0), "its model's sizes are not those of its weights"),
        (larger("dropout", "x"), "its model's sizes are not those of its weights"),
    ],
)
def test_a_checkpoint_that_no_run_has_written_is_refused(tmp_path: Path, change: Change, message: str) -> None:
    checkpoint = of_checkpoint(tmp_path)
    state = json.loads((checkpoint.folder / "state.json").read_text())
    change(state)
    (checkpoint.folder / "state.json").write_text(json.dumps(state))
    checkpoint.sign("state.json")
    with pytest.raises(ConfigError) as error:
        main([f"run.dir={checkpoint.folder}"])
    assert error.value.problems[0].startswith(f"{checkpoint.folder}: is no sound checkpoint: {message}")


def test_a_changed_digit_of_the_state_is_found_and_a_state_without_a_hash_is_read(tmp_path: Path) -> None:
    folder = of_checkpoint(tmp_path).folder
    state = json.loads((folder / "state.json").read_text())
    state["position"]["offset"] += 1
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(ConfigError, match=r"state\.json was cut off or altered"):
        read(folder)
    del state["sha256"]["state.json"]
    (folder / "state.json").write_text(json.dumps(state))
    assert read(folder).state["position"]["offset"] == 37


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    checkpoint = of_checkpoint(tmp_path)
    main([f"run.dir={checkpoint.folder}", "num_tokens=9"])
    path = checkpoint.folder / "weights.safetensors"
    save_file({name: array * np.nan for name, array in load_file(path).items()}, path)
    checkpoint.sign("weights.safetensors")
    with pytest.raises(ConfigError, match="its weights give no finite numbers; use another checkpoint"):
        main([f"run.dir={checkpoint.folder}"])


def test_a_damaged_file_has_one_message_and_status_2(tmp_path: Path) -> None:
    checkpoint = of_checkpoint(tmp_path)
    (checkpoint.folder / "weights.safetensors").write_bytes(b"\xff" * 100)
    checkpoint.sign("weights.safetensors")
    result = run([sys.executable, "-m", "recipes", "generate", f"run.dir={checkpoint.folder}"])
    assert (result.returncode, len(result.stdout.splitlines())) == (2, 1), result.stdout
    assert "weights.safetensors cannot be understood: Error while deserializing" in result.stdout


def test_an_unknown_command_is_named() -> None:
    result = run([sys.executable, "-m", "recipes", "generat"])
    known = "choose check-ledger|elastic-demo|generate|plan|shard-data|supervise,"
    assert (result.returncode, f"generat: no such command; {known}" in result.stdout) == (2, True)

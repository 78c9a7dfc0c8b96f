"""What the ledger says of runs that are right, and of runs that are not."""

import json
from pathlib import Path

from common.data import example_log
from common.errors import ConfigError
from tests.helpers.ledger import note

import pytest


def lines(folder: Path) -> list[tuple[bool, str]]:
    return list(example_log.check(folder))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_each_example_once_at_any_number_of_ranks(tmp_path: Path, world_size: int) -> None:
    note(tmp_path, world_size)
    assert lines(tmp_path) == [(True, f"epoch {epoch}: 37 of 37 examples, each once") for epoch in (1, 2)]


def test_steps_that_were_redone_count_once(tmp_path: Path) -> None:
    note(tmp_path, 4, stop=7)
    note(tmp_path, 2, start=3, stop=6)
    example_log.drop(tmp_path, 2)  # before a launch from step 3 on
    note(tmp_path, 3, start=2)
    assert all(is_right for is_right, _ in lines(tmp_path))


def test_a_run_that_ended_within_an_epoch(tmp_path: Path) -> None:
    note(tmp_path, 2, stop=7)
    assert lines(tmp_path)[1] == (True, "epoch 2: 16 of 37 examples, each once; the run ended within the epoch")


def test_what_the_run_resumed_from_has_used_is_not_lost(tmp_path: Path) -> None:
    note(tmp_path, 2, start=2)
    used = "21 of 37 examples, each once; 16 were used by the run it was resumed from"
    assert lines(tmp_path) == [(True, f"epoch 1: {used}"), (True, "epoch 2: 37 of 37 examples, each once")]
    example_log.drop(tmp_path, 2)
    note(tmp_path, 1, start=2, stop=4)
    note(tmp_path, 1, start=4, epochs=1)  # a second launch in the same folder adds to the first one
    assert lines(tmp_path) == [(True, f"epoch 1: {used}")]
    change(tmp_path, 1, [], "from-step-00000005")
    assert lines(tmp_path) == [(False, f"epoch 1: {used.replace('21', '16')}; 5 were lost")]


def without_offset(header: dict[str, object]) -> object:
    return {key: value for key, value in header.items() if key != "offset"}


def test_a_ledger_of_an_earlier_version_and_one_that_was_just_begun_are_read(tmp_path: Path) -> None:
    note(tmp_path, 2)
    first, second = sorted(tmp_path.glob("ledger/*.jsonl"))
    header, *steps = first.read_text().splitlines()
    first.write_text("\n".join([json.dumps(without_offset(json.loads(header))), *steps, ""]))
    (second.parent / "from-step-00000011.rank-0000.jsonl").write_text('{"num_exa')
    assert all(is_right for is_right, _ in lines(tmp_path))


def change(folder: Path, step: int, examples: list[int], launch: str = "*") -> None:
    """Alters what rank 0 noted."""
    (path,) = folder.glob(f"ledger/{launch}.rank-0000.jsonl")
    changed = [json.loads(line) for line in path.read_text().splitlines()]
    changed[step]["examples"] = examples
    path.write_text("".join(json.dumps(line) + "\n" for line in changed))


def test_lost_doubled_and_foreign_examples_are_found(tmp_path: Path) -> None:
    note(tmp_path, 1, epochs=1)
    (path,) = tmp_path.glob("ledger/*.jsonl")
    examples = json.loads(path.read_text().splitlines()[2])["examples"]
    change(tmp_path, 2, examples[1:])
    assert lines(tmp_path) == [(False, "epoch 1: 36 of 37 examples, each once; 1 were lost")]
    change(tmp_path, 2, [examples[1], *examples[1:]])
    message = f"epoch 1: 1 of 37 examples more than once, such as number {examples[1]}"
    assert lines(tmp_path) == [(False, message)]
    change(tmp_path, 2, [37, *examples[1:]])
    assert lines(tmp_path) == [(False, "epoch 1: example 37 is none of the 37")]
    path.write_text("\n" + path.read_text())
    with pytest.raises(ConfigError, match="is damaged"):
        lines(tmp_path)
    with pytest.raises(ConfigError, match=r"has no ledger; train with data.ledger=true"):
        lines(tmp_path / "elsewhere")


HEADER, STEP = '{"num_examples": 3, "resampled": false}', '{"step": 1, "epoch": 1, "used": 3, "examples": [0, 1, 2]}'


@pytest.mark.parametrize(
    "content",
    [
        "[" * 2000 + "]" * 2000,
        "7",
        f"{STEP}\n{STEP}",
        HEADER.replace("3", "-3"),
        HEADER.replace("3", '"3"'),
        f"{HEADER}\n[]",
        f"{HEADER}\n{STEP.replace('[0, 1, 2]', '3')}",
        f"{HEADER}\n{STEP.replace('[0, 1, 2]', '[[0]]')}",
        f"{HEADER}\n{STEP.replace('1, 2]', 'NaN]')}",
        f"{HEADER}\n{STEP.replace('epoch', 'epochs')}",
        "\udcff",
    ],
)
def test_a_file_that_no_run_has_written_is_damaged(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ledger" / "from-step-00000001.rank-0000.jsonl"
    path.parent.mkdir()
    path.write_text(f"{content}\n", errors="surrogateescape")
    with pytest.raises(
        ConfigError, match=r"rank-0000\.jsonl: is damaged: .*; train again with data.ledger=true"
    ) as error:
        lines(tmp_path)
    assert "\n" not in str(error.value)


def test_a_file_of_another_name_is_no_part_of_a_ledger(tmp_path: Path) -> None:
    note(tmp_path, 1)
    (tmp_path / "ledger" / "from-step-one.jsonl").touch()
    for read in (lines, lambda folder: example_log.drop(folder, 0)):
        with pytest.raises(ConfigError, match=r"from-step-one\.jsonl: is no file of a ledger"):
            read(tmp_path)

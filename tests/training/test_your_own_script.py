"""Scripts that are no recipes: what docs/your-own-script.md shows, on real ranks."""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from common.data.datasets import digits
from common.distributed.topology import Topology
from common.errors import TrainingError
from tests.helpers.launch import FRAMEWORKS, ROOT, horovodrun, run

import numpy as np
import pytest

BATCH = 35  # divided by 2 as little as by 3; 107 examples leave 2 for the last step: with 3 ranks one has none


def numbers(text: str) -> list[float]:
    """The losses that a script of the document prints."""
    return [float(word) for line in re.findall(r"losses: (.*)", text) for word in re.findall(r"\d+\.\d+", line)]


PAGES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "your-own-script.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if ("import keras" in page) <= ("tf" in FRAMEWORKS)])
def test_the_pages_of_the_document_print_the_same_on_any_number_of_ranks(page: str, tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(page)
    alone, together = run([sys.executable, path], cwd=tmp_path), horovodrun(2, path, cwd=tmp_path)
    assert (alone.returncode, together.returncode) == (0, 0), alone.stdout + together.stdout
    assert len(numbers(alone.stdout)) == 6
    assert numbers(together.stdout) == pytest.approx(numbers(alone.stdout), rel=1e-5)


@pytest.fixture
def script(framework: str) -> ModuleType:
    """tests/helpers/own_script_tf.py or _torch.py."""
    return importlib.import_module(f"tests.helpers.own_script_{framework}")


def data(num_train: int, num_test: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Digits to train and to test."""
    train, test = digits.load()
    return [train.get_batch(slice(num_train)), test.get_batch(slice(num_test))]


@pytest.mark.ranks(2, 3, framework="torch")
@pytest.mark.parametrize("num_examples", [107, 2])  # with 3 ranks, the 2 leave one without any
def test_every_epochs_values_are_those_of_the_framework_on_one_rank(
    runtime: ModuleType, script: ModuleType, num_examples: int
) -> None:
    runtime.init()
    examples = data(num_examples, 31)
    expected = script.of_one_rank(examples, BATCH, epochs=2)
    history = script.of_all_ranks(examples, BATCH, epochs=2)
    assert history.keys() == expected.keys()
    for name, values in expected.items():
        assert history[name] == pytest.approx(values, rel=1e-5), name
    everyones = runtime.allgather_object(history)
    assert all(of_rank == everyones[0] for of_rank in everyones)


@pytest.mark.ranks(2, framework="torch")
def test_ranks_that_do_not_exchange_are_found_out(script: ModuleType) -> None:
    with pytest.raises(TrainingError, match="hold other weights than rank 0"):
        script.of_all_ranks(data(50, 10), BATCH, epochs=1, exchange=False)


@pytest.mark.ranks(2, framework="torch")
def test_statistics_are_averaged_for_a_plain_loop(runtime: ModuleType) -> None:
    from common.torch.data.loop import average_statistics

    import torch

    topology = runtime.init()
    layer = torch.nn.BatchNorm1d(2, momentum=1.0)
    layer(torch.tensor([[0.0, 1.0], [2.0, 1.0]]) + topology.rank)
    with pytest.raises(TrainingError):
        runtime.assert_weights_in_sync(layer)
    average_statistics(layer)
    runtime.assert_weights_in_sync(layer)
    assert layer.state_dict()["running_mean"].tolist() == [1.5, 1.5]


@pytest.mark.ranks(2, framework="torch")
def test_a_batch_of_none_is_made_like_any_other() -> None:
    from common.torch.data.loop import ShardedBatches

    import torch

    examples: Any = [{"image": torch.ones(2, 3), "both": (number, 0.5)} for number in range(5)]
    batches = ShardedBatches(examples, 4, Topology(1, 2, 1, 2), shuffle=False)
    (first, first_size), (last, last_size) = batches.epoch()
    assert (first_size, last_size) == (4, 1)
    assert first["both"][0].tolist() == [2, 3]
    assert last["image"].shape == (0, 2, 3)
    assert [part.shape for part in last["both"]] == [(0,), (0,)]

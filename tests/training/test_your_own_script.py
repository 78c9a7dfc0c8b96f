"""Scripts that are no recipes: what docs/your-own-script.md shows, on real ranks."""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from common.config.composition import compose
from common.data.datasets import digits
from common.distributed.topology import Topology
from common.errors import TrainingError
from tests.helpers.launch import FRAMEWORKS, ROOT, horovodrun, read_events, run

import numpy as np
import pytest

BATCH = 35  # divided by 2 as little as by 3; 107 examples leave 2 for the last step: with 3 ranks one has none


def numbers(text: str) -> list[float]:
    """The losses that a script of the document prints."""
    return [float(word) for line in re.findall(r"losses: (.*)", text) for word in re.findall(r"\d+\.\d+", line)]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_scripts_of_the_document_print_the_same_on_any_number_of_ranks(framework: str, tmp_path: Path) -> None:
    scripts = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "your-own-script.md").read_text(), re.DOTALL)
    (script,) = [script for script in scripts if f"from common.{framework}." in script]
    path = tmp_path / "script.py"
    path.write_text(script)
    alone, together = run([sys.executable, path]), horovodrun(2, path)
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


@pytest.mark.ranks(2, 3)
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


@pytest.mark.ranks(2)
def test_ranks_that_do_not_exchange_are_found_out(
    framework: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    if framework == "tf":
        with pytest.raises(ValueError, match=r"optimizer=distributed\(optimizer\)"):
            script.of_all_ranks(data(50, 10), BATCH, epochs=1, exchange=False)
        monkeypatch.setattr("common.tf.fit._check_compiled", lambda model: None)
    with pytest.raises(TrainingError, match="hold other weights than rank 0"):
        script.of_all_ranks(data(50, 10), BATCH, epochs=1, exchange=False)


@pytest.mark.ranks(2, framework="tf")
def test_fit_gives_the_curve_of_the_recipe(shared_path: Path) -> None:
    from common.tf import fit
    from common.tf.distributed import runtime
    from common.tf.gradients import optimizers
    from recipes import mnist_mlp_tf

    import keras

    keys = ["train.epochs=2", "train.log_every=1", "train.clip_norm=0", "lr_schedule=constant", "model.dropout=0"]
    small = ["lr_schedule.warmup_steps=0", "model.hidden_sizes=[32]"]
    cfg: Any = compose("mnist_mlp", [*keys, *small, f"run.dir={shared_path}"])
    topology = runtime.init()
    mnist_mlp_tf.train(cfg)
    runtime.seed(cfg.seed, topology)
    model = keras.Sequential([keras.Input((28, 28)), *mnist_mlp_tf.build_layers(cfg.model)])
    model.compile(
        fit.distributed(optimizers.build(cfg.optimizer, model)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    train, test = (split.get_batch(slice(None)) for split in digits.load())
    size = cfg.train.global_batch_size
    history = model.fit(
        fit.ShardedBatches(*train, size, topology, seed=cfg.seed),
        shuffle=False,
        epochs=2,
        validation_data=fit.ShardedBatches(*test, size, topology, shuffle=False),
        callbacks=[fit.Synchronise()],
        verbose=0,
    ).history
    events = read_events(shared_path)
    tests = [event for event in events if "test_loss" in event]
    assert history["val_loss"] == pytest.approx([event["test_loss"] for event in tests], rel=1e-5)
    assert history["val_accuracy"] == pytest.approx([event["test_accuracy"] for event in tests])
    losses = {event["step"]: event["train_loss"] for event in events if "train_loss" in event}
    num_steps = -(-len(train[1]) // size)
    sizes = [size] * (num_steps - 1) + [len(train[1]) - size * (num_steps - 1)]
    expected = [
        np.average([losses[epoch * num_steps + step] for step in range(1, num_steps + 1)], weights=sizes)
        for epoch in range(2)
    ]
    assert history["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.ranks(3, framework="tf")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' ReduceLROnPlateau
def test_convolutions_statistics_and_the_callbacks_of_keras_go_along() -> None:
    from common.tf import fit
    from common.tf.distributed import runtime
    from tests.helpers import own_script_tf

    import keras

    topology = runtime.init()
    layers = [keras.layers.Reshape((28, 28, 1)), keras.layers.Conv2D(4, 3, activation="gelu", strides=3)]
    layers += [keras.layers.BatchNormalization(), keras.layers.Dropout(0.1), keras.layers.Flatten()]
    model = own_script_tf.build(layers)
    optimizer = keras.optimizers.SGD(3.0, momentum=0.9, gradient_accumulation_steps=2)  # too fast to get better
    own_script_tf.compile_model(model, fit.distributed(optimizer), steps_per_execution=2, jit_compile=True)
    train, test = own_script_tf.batches(data(107, 31), BATCH, topology, seed=1)
    rate = keras.callbacks.ReduceLROnPlateau(patience=1)
    stop = keras.callbacks.EarlyStopping(patience=3, restore_best_weights=True)
    options: dict[str, Any] = {"validation_data": test, "callbacks": [stop, fit.Synchronise(), rate], "verbose": 0}
    history = model.fit(train, shuffle=False, epochs=12, **options).history
    assert len(history["loss"]) < 12
    assert history["learning_rate"][-1] < 3.0
    assert np.isfinite(history["val_loss"]).all()
    everyones = runtime.allgather_object(history)
    assert all(of_rank == everyones[0] for of_rank in everyones)


@pytest.mark.ranks(2, framework="tf")
def test_what_would_not_be_exact_is_refused() -> None:
    from common.tf import fit
    from common.tf.distributed import runtime
    from tests.helpers import own_script_tf

    import keras

    class Largest(keras.metrics.Metric):
        def __init__(self) -> None:
            super().__init__(name="largest")
            self.largest = self.add_weight(shape=(), initializer="zeros")

        def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
            self.largest.assign(keras.ops.maximum(self.largest, keras.ops.max(y_pred)))

        def result(self) -> Any:
            return self.largest

    topology = runtime.init()
    train, _ = own_script_tf.batches(data(107, 31), BATCH, topology, seed=1)
    mean, total = (
        keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
        for reduction in ("sum_over_batch_size", "sum")
    )

    def fit_with(loss: Any, metrics: Any = None, steps_per_epoch: int | None = None, **options: Any) -> None:
        model = own_script_tf.build()
        model.compile(fit.distributed(keras.optimizers.SGD(0.1)), loss, metrics=metrics)
        callbacks = [fit.Synchronise(**options)]
        model.fit(train, shuffle=False, steps_per_epoch=steps_per_epoch, callbacks=callbacks, verbose=0)

    with pytest.raises(ValueError, match=r"SparseCategoricalCrossentropy\(reduction='sum'\)"):
        fit_with(total)
    with pytest.raises(ValueError, match=r"largest \(Largest\)"):
        fit_with(mean, [Largest()])
    fit_with(mean, [Largest()], additive=[Largest])
    with pytest.raises(ValueError, match=r"Received: \[2, 3\]"):
        fit_with(mean, steps_per_epoch=2 + topology.rank)


@pytest.mark.ranks(2, framework="tf")
def test_keras_may_not_shuffle_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from common.tf.distributed import runtime
    from tests.helpers import own_script_tf

    import keras
    import tensorflow as tf

    runtime.init()
    monkeypatch.setattr("random.shuffle", lambda indices: indices.reverse())
    for workers in (1, 2):
        model = own_script_tf.build()
        own_script_tf.compile_model(model, keras.optimizers.SGD(0.1))
        train, _ = own_script_tf.batches(data(200, 1), BATCH, own_script_tf.ALONE, seed=1)
        train.workers = workers
        model.fit(train, shuffle=False, verbose=0)
        with pytest.raises(tf.errors.OpError, match="shuffle=False"):
            model.fit(train, shuffle=True, verbose=0)


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

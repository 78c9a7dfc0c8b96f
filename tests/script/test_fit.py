"""Data-parallel model.fit on real ranks: what scripts as in tests/scripts/ do not show."""

import warnings
from pathlib import Path
from typing import Any

from tests.helpers import compressors

import numpy as np
import pytest

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras itself

RANDOM = np.random.default_rng(1)
X, Y = RANDOM.normal(size=(65, 8)).astype("float32"), RANDOM.integers(3, size=65)


def build(*layers: Any, optimizer: Any = "adam", loss: Any = None, **options: Any) -> Any:
    """A small compiled model with the same weights on all ranks."""
    from common.tf.script import fit

    import keras

    fit.init(seed=1)
    outputs = [keras.layers.Dense(16, "gelu"), *layers, keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((8,)), *outputs])
    model.compile(optimizer, loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True), **options)
    return model


def train(model: Any, epochs: int = 1, callbacks: Any = (), **options: Any) -> dict[str, list[float]]:
    """Fits a model to the same data."""
    given = {"batch_size": 16, "verbose": 0, "epochs": epochs, "callbacks": list(callbacks)} | options
    return dict(model.fit(X, Y, **given).history)


def equal_on_all_ranks(value: Any) -> bool:
    """Whether a JSON value is the same on all ranks."""
    from common.tf.distributed import runtime

    everyones = runtime.allgather_object(value)
    return all(of_rank == everyones[0] for of_rank in everyones)


def refused(capfd: pytest.CaptureFixture[str], action: Any) -> str:
    """What rank 0 prints when all ranks refuse an action with status 2."""
    with pytest.raises(SystemExit) as end:
        action()
    assert end.value.code == 2
    return capfd.readouterr().err


@pytest.mark.ranks(2, framework="tf")
def test_losses_that_ranks_cannot_compute_from_parts_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    from common.tf.script import fit

    import keras

    def rmse(y_true: Any, y_pred: Any) -> Any:
        targets = keras.ops.cast(keras.ops.reshape(y_true, (-1, 1)), "float32")
        return keras.ops.sqrt(keras.ops.mean(keras.ops.square(y_pred - targets)))

    total = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
    rank = fit.init().rank
    for loss, message in ((rmse, "root of a mean"), (total, "reduction='sum_over_batch_size'")):
        model = fit.distribute(build(loss=loss))
        weights = model.get_weights()
        problem = refused(capfd, lambda model=model: train(model))
        assert (message in problem) == (rank == 0)
        for before, after in zip(weights, model.get_weights(), strict=True):
            np.testing.assert_array_equal(before, after)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, "sigmoid")])
    model.compile("sgd", keras.losses.Dice())
    fit.distribute(model)
    problem = refused(capfd, lambda: model.fit(X, np.abs(X), batch_size=16, verbose=0))
    assert ("Dice" in problem) == (rank == 0)


def own_step(loss_of: Any, *layers: Any, change: Any = lambda gradients: gradients) -> Any:
    """A distributed model with a train_step of its own, for a loss of outputs and targets."""
    from common.tf.script import fit

    import keras
    import tensorflow as tf

    class Own(keras.Sequential):
        def train_step(self, data: Any) -> Any:
            inputs, targets = data
            with tf.GradientTape() as tape:
                outputs = self(inputs, training=True)
                loss = loss_of(outputs, tf.one_hot(targets, 3)) + sum(self.losses)
            weights = self.trainable_variables
            self.optimizer.apply(change(tape.gradient(loss, weights)), weights)
            return {"value": loss}

    fit.init(seed=1)
    model = Own([keras.Input((8,)), *layers, keras.layers.Dense(3, kernel_regularizer="l2")])
    model.compile(keras.optimizers.SGD(0.01))
    return fit.distribute(model)


@pytest.mark.ranks(2, framework="tf")
@pytest.mark.parametrize("kind", ["sum", "contrastive", "clipped", "added", "tape"])
def test_steps_whose_gradients_are_no_means_are_refused(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    from common.tf.script import fit

    import keras
    import tensorflow as tf

    class Added(keras.layers.Layer):
        def call(self, inputs: Any) -> Any:
            self.add_loss(keras.ops.sum(keras.ops.square(inputs)))
            return inputs

    def mean(outputs: Any, targets: Any) -> Any:
        return keras.ops.mean(keras.ops.square(outputs - targets))

    def added_up(outputs: Any, targets: Any) -> Any:
        return keras.ops.sum(keras.ops.square(outputs - targets))

    def contrastive(outputs: Any, targets: Any) -> Any:
        return -keras.ops.mean(keras.ops.diagonal(keras.ops.log_softmax(outputs @ keras.ops.transpose(outputs))))

    def fit_step(model: Any) -> tuple[Any, Any]:
        return model, lambda: train(model)

    def tape_step() -> tuple[Any, Any]:
        model, optimizer = build(), keras.optimizers.SGD(0.01)

        def step(inputs: Any, *, targets: Any) -> None:
            with tf.GradientTape() as tape:
                loss = added_up(model(inputs), tf.one_hot(targets, 3))
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

        return model, lambda: fit.data_parallel(step, model, optimizer)(tf.constant(X), targets=tf.constant(Y))

    model, action = {
        "sum": lambda: fit_step(own_step(added_up)),
        "contrastive": lambda: fit_step(own_step(contrastive)),
        "clipped": lambda: fit_step(own_step(mean, change=lambda all: [tf.clip_by_norm(each, 1e-3) for each in all])),
        "added": lambda: fit_step(fit.distribute(build(Added()))),
        "tape": tape_step,
    }[kind]()
    before = model.get_weights()
    assert ("add_loss or a layer adds losses up" in refused(capfd, action)) == (fit.init().rank == 0)
    assert all(np.array_equal(*pair) for pair in zip(before, model.get_weights(), strict=True))


@pytest.mark.ranks(2, framework="tf")
def test_steps_of_ones_own_are_not_refused() -> None:
    import keras
    import tensorflow as tf

    class Noise(keras.layers.Layer):
        def call(self, inputs: Any) -> Any:
            return inputs + tf.random.normal(tf.shape(inputs)) + keras.random.normal(keras.ops.shape(inputs))

    def mean(outputs: Any, targets: Any) -> Any:
        return keras.ops.mean(keras.ops.square(outputs - targets))

    normal = [keras.layers.BatchNormalization(synchronized=is_of_all) for is_of_all in (False, True)]
    for layers in ([], normal, [keras.layers.Dropout(0.5)], [Noise()]):
        assert train(own_step(mean, *layers), epochs=2)["value"][-1] > 0


@pytest.mark.ranks(2, framework="tf")
def test_a_regulariser_of_activities_is_exact_or_refused(capfd: pytest.CaptureFixture[str]) -> None:
    from common.tf.script import fit

    import keras

    def regularised() -> Any:
        return fit.distribute(build(keras.layers.ActivityRegularization(l2=0.1), optimizer="sgd"))

    version = tuple(map(int, keras.__version__.split(".")[:2]))
    if version < (3, 13):
        assert ("sum over the batch" in refused(capfd, lambda: train(regularised()))) == (fit.init().rank == 0)
    else:
        model = regularised()
        weights = model.get_weights()
        losses = train(model, batch_size=65)["loss"]
        model.set_weights(weights)
        plain = keras.losses.sparse_categorical_crossentropy(Y, model.predict(X, verbose=0), from_logits=True).numpy()
        hidden = keras.Model(model.inputs, model.layers[0].output).predict(X, verbose=0)
        assert losses[0] == pytest.approx(plain.mean() + 0.1 * np.square(hidden).sum(axis=1).mean(), rel=1e-5)


@pytest.mark.ranks(2, framework="tf")
def test_metrics_that_do_not_add_up_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    from common.tf.script import fit

    import keras

    class Largest(keras.metrics.Metric):
        def __init__(self) -> None:
            super().__init__(name="largest")
            self.largest = self.add_weight(shape=(), initializer="zeros")

        def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
            self.largest.assign(keras.ops.maximum(self.largest, keras.ops.max(y_pred)))

        def result(self) -> Any:
            return self.largest

    class Percent(keras.Model):
        def train_step(self, data: Any) -> Any:
            results = super().train_step(data)
            return {**results, "percent": 100 * results["accuracy"]}

    rank = fit.init().rank
    model = fit.distribute(build(metrics=[Largest()]))
    assert ("largest (Largest)" in refused(capfd, lambda: train(model))) == (rank == 0)
    train(fit.distribute(build(metrics=[Largest()]), additive=[Largest]))
    inputs = keras.Input((8,))
    percent = Percent(inputs, keras.layers.Dense(3, "softmax")(inputs))
    percent.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    fit.distribute(percent)
    assert ("add a metric that computes it" in refused(capfd, lambda: train(percent))) == (rank == 0)


@pytest.mark.ranks(2, framework="tf")
def test_state_that_nobody_knows_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    from common.tf.script import fit

    import keras

    class Hidden(keras.Model):
        @property
        def metrics(self) -> list[Any]:
            return []

        def train_step(self, data: Any) -> Any:
            x, y = data
            seen.update_state(keras.losses.sparse_categorical_crossentropy(y, self(x)))
            return {"seen": seen.result()}

    seen = keras.metrics.Mean()
    inputs = keras.Input((8,))
    model = Hidden(inputs, keras.layers.Dense(3, "softmax")(inputs))
    model.compile("sgd")
    fit.distribute(model)
    problem = refused(capfd, lambda: train(model))
    assert ("give it to a metric or a layer of the model" in problem) == (fit.init().rank == 0)


@pytest.mark.ranks(2, framework="tf")
def test_targets_that_a_loss_ignores_do_not_count() -> None:
    from common.tf.script import fit

    import keras
    import tensorflow as tf

    def whole_digits(y_true: Any, y_pred: Any) -> Any:
        return tf.one_hot(y_true, 3)[:, 0]  # needs integers

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=1)
    model = fit.distribute(build(optimizer=keras.optimizers.SGD(0.0), loss=loss, metrics=[whole_digits]))
    found = train(model, batch_size=65, shuffle=False)["loss"][0]
    logits = model.predict(X, verbose=0)
    values = keras.losses.sparse_categorical_crossentropy(Y, logits, from_logits=True).numpy()
    assert found == pytest.approx(values[Y != 1].mean(), rel=1e-5)


@pytest.mark.ranks(2, framework="tf")
def test_ranks_that_differ_are_refused_before_the_first_step(capfd: pytest.CaptureFixture[str]) -> None:
    from common.tf.script import fit

    import keras
    import tensorflow as tf

    rank = fit.init().rank

    def with_rate() -> None:
        train(fit.distribute(build(optimizer=keras.optimizers.SGD(0.1 * (1 + rank)))))

    def with_units() -> None:
        train(fit.distribute(build(keras.layers.Dense(4 + rank))))

    def with_length() -> None:
        fit.distribute(build()).fit(X[rank:], Y[rank:], batch_size=16, verbose=0)

    def with_order() -> None:
        dataset = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(65, seed=rank).batch(16)
        fit.distribute(build()).fit(dataset, shuffle=False, verbose=0)

    actions = {"learning_rate": with_rate, "weights of the model": with_units, "(64, 8)": with_length}
    for message, action in (actions | {"the ranks have read other batches": with_order}).items():
        assert (message in refused(capfd, action)) == (rank == 0), message


@pytest.mark.ranks(2, framework="tf")
def test_an_evaluation_before_training_changes_nothing() -> None:
    from common.tf.script import fit

    plain = train(fit.distribute(build(metrics=["accuracy"])), epochs=2, validation_split=0.2)
    model = fit.distribute(build(metrics=["accuracy"]))
    score = model.evaluate(X, Y, verbose=0, return_dict=True)
    assert train(model, epochs=2, validation_split=0.2) == plain
    assert equal_on_all_ranks(score)


@pytest.mark.ranks(2, framework="tf")
def test_a_model_may_be_compiled_again() -> None:
    from common.tf.script import fit

    import keras

    model = fit.distribute(build())
    train(model)
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(True), jit_compile=True)
    train(model)
    assert model.jit_compile is False


@pytest.mark.ranks(2, framework="tf")
@pytest.mark.parametrize("noise", ["batch", "rank"])
def test_ranks_draw_noise_of_their_own(noise: str) -> None:
    from common.tf.distributed import runtime
    from common.tf.script import fit

    import keras
    import tensorflow as tf

    drawn: list[float] = []

    class Noisy(keras.Model):
        def call(self, inputs: Any) -> Any:
            return inputs

        def test_step(self, data: Any) -> Any:
            def note(*values: Any) -> Any:
                drawn.extend(float(value) for value in values)
                return np.float32(0)

            rows = tf.shape(data)[0]
            of_keras, of_tf = keras.random.uniform((rows, 1), seed=3), tf.random.uniform((rows, 1))
            return {"seen": tf.ensure_shape(tf.numpy_function(note, [of_keras[0, 0], of_tf[0, 0]], tf.float32), ())}

    topology = fit.init(seed=1, noise=noise)
    model = Noisy()
    model.compile()
    fit.distribute(model)
    model.evaluate(np.zeros((4, 1), "float32"), batch_size=4, verbose=0)
    of_ranks = runtime.allgather_object(drawn)
    expected = keras.random.uniform((4, 1), seed=3).numpy()[:: 4 // topology.world_size, 0]
    assert ([of_rank[0] for of_rank in of_ranks] == pytest.approx(expected.tolist())) == (noise == "batch")
    assert all(mine != other for mine, other in zip(*of_ranks, strict=True))


@pytest.mark.ranks(2, framework="tf")
def test_a_model_that_is_not_distributed_says_so() -> None:
    from common.tf.script import fit

    with pytest.warns(UserWarning, match=r"not distributed.*distribute\(model\)"):
        train(build())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(fit.distribute(build()))


@pytest.mark.ranks(2, framework="tf")
def test_a_callback_on_one_rank_does_as_it_likes() -> None:
    from common.tf.script import fit

    import keras

    topology = fit.init()
    seen: list[Any] = []

    class Curious(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            seen.append((self.model.evaluate(X, Y, verbose=0), self.model.predict(X[:5], verbose=0)))

    class Impatient(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.model.stop_training = self.params["epochs"] == 9 and batch == 2

    model = fit.distribute(build(metrics=["accuracy"]))
    train(model, epochs=2, callbacks=[Curious()] if topology.rank else [], validation_data=(X, Y))
    score, predicted = model.evaluate(X, Y, verbose=0), model.predict(X[:5], verbose=0)
    if topology.rank:
        assert seen[-1][0] == pytest.approx(score, rel=1e-6)
        np.testing.assert_allclose(seen[-1][1], predicted, rtol=1e-6)
    assert len(train(model, epochs=9, callbacks=[Impatient()] if topology.rank else [])["loss"]) == 1


@pytest.mark.ranks(2, framework="tf")
def test_all_ranks_end_at_a_nan_that_one_of_them_sees() -> None:
    from common.tf.script import fit

    import keras

    x = X.copy()
    x[15] = np.nan  # the last row of the first batch
    history = fit.distribute(build()).fit(
        x, Y, batch_size=16, shuffle=False, epochs=3, verbose=0, callbacks=[keras.callbacks.TerminateOnNaN()]
    )
    assert len(history.history["loss"]) == 1


@pytest.mark.ranks(2, framework="tf")
def test_integer_state_of_a_layer_is_that_of_rank_0() -> None:
    from common.tf.script import fit

    import keras

    class Counter(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            self.seen = self.add_weight(shape=(), dtype="int64", initializer="zeros", trainable=False)

        def call(self, inputs: Any) -> Any:
            self.seen.assign_add(keras.ops.cast(keras.ops.shape(inputs)[0], "int64"))
            return inputs

    counter = Counter()
    train(fit.distribute(build(counter)))
    assert int(counter.seen.numpy()) == 33  # 4 * 8 + 1 of 65


@pytest.mark.ranks(2, framework="tf")
def test_gradients_are_exchanged_once_per_update(monkeypatch: pytest.MonkeyPatch) -> None:
    from common.tf.gradients.allreduce import AllreduceSync
    from common.tf.script import fit

    import keras

    counts: dict[str, float] = {}
    for steps in (None, 5):
        model = fit.distribute(build(optimizer=keras.optimizers.SGD(0.1, gradient_accumulation_steps=steps)))
        made: list[AllreduceSync] = []
        plain = AllreduceSync.__init__

        def note(self: AllreduceSync, *args: Any, plain: Any = plain, made: Any = made, **kwargs: Any) -> None:
            plain(self, *args, **kwargs)
            made.append(self)

        monkeypatch.setattr(AllreduceSync, "__init__", note)
        train(model)
        monkeypatch.undo()
        (sync,) = made
        counts[str(steps)] = sync.counters().num_steps
    assert counts == {"None": 5, "5": 1}


@pytest.mark.ranks(2, framework="tf")
def test_a_dataset_that_is_already_divided() -> None:
    from common.tf.script import fit

    import tensorflow as tf

    def dataset(rows: Any) -> Any:
        return tf.data.Dataset.from_tensor_slices((X[rows], Y[rows]))

    topology = fit.init()
    whole = fit.distribute(build(metrics=["accuracy"])).fit(
        dataset(slice(64)).batch(16), shuffle=False, verbose=0, epochs=2
    )
    mine = dataset(slice(64)).batch(8).shard(topology.world_size, topology.rank)
    divided = fit.distribute(build(metrics=["accuracy"])).fit(fit.own_batches(mine), shuffle=False, verbose=0, epochs=2)
    for name, values in whole.history.items():
        assert divided.history[name] == pytest.approx(values, rel=1e-5)


@pytest.mark.ranks(2, framework="tf")
@pytest.mark.parametrize("method", [*compressors.of_scripts(), "adasum"])
def test_gradients_may_be_compressed(method: str) -> None:
    from common.tf.distributed import runtime
    from common.tf.script import fit

    options = {"op": method} if method == "adasum" else {"compression": {"name": method, "min_numel": 16}}
    model = fit.distribute(build(), **options)
    losses = train(model, epochs=4)["loss"]
    assert losses[-1] < losses[0]
    runtime.assert_weights_in_sync(model)


@pytest.mark.ranks(2, framework="tf")
def test_what_was_saved_is_loaded_and_goes_on(shared_path: Path) -> None:
    from common.tf.distributed import runtime
    from common.tf.script import fit

    import keras

    model = fit.distribute(build(metrics=["accuracy"]))
    train(model, epochs=2)
    if fit.init().rank == 0:
        model.save(shared_path / "model.keras")
    runtime.allgather_object(None)
    on = train(model, shuffle=False)
    fit.init(seed=1)
    loaded = fit.distribute(keras.models.load_model(shared_path / "model.keras"))
    assert type(loaded.optimizer) is keras.optimizers.Adam
    assert train(loaded, shuffle=False)["loss"] == pytest.approx(on["loss"])


@pytest.mark.ranks(2, framework="tf")
def test_a_tape_loop_names_what_it_forgot(capfd: pytest.CaptureFixture[str]) -> None:
    from common.tf.script import fit

    import keras

    model, accuracy = build(), keras.metrics.SparseCategoricalAccuracy()

    def step(inputs: Any, targets: Any) -> None:
        accuracy.update_state(targets, model(inputs))

    problem = refused(capfd, lambda: fit.data_parallel(step, model)(X, Y))
    assert ("metrics=[...]" in problem) == (fit.init().rank == 0)
    fit.data_parallel(step, model, metrics=[accuracy])(X, Y)

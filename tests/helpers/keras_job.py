"""A script for Horovod's own Keras API, run under Keras 3 by tests/install/test_horovod.py.

horovodrun -np N python -m tests.helpers.keras_job FOLDER
"""

import sys
from pathlib import Path

import horovod.tensorflow as hvd
import horovod.tensorflow.keras as hvd_keras
import keras
import numpy as np
import pytest
import tensorflow as tf

EXAMPLES, STEPS = 24, 6


def data() -> tuple[np.ndarray, np.ndarray]:
    """All examples."""
    random = np.random.default_rng(0)
    inputs = random.random((EXAMPLES * STEPS, 5), np.float32)
    return inputs, inputs @ random.random((5, 2), np.float32)


def small_model(seed: int) -> keras.Model:
    """Begins from other weights with another seed."""
    layer = keras.layers.Dense(2, kernel_initializer=keras.initializers.RandomNormal(seed=seed))
    return keras.Sequential([keras.Input((5,)), layer])


def part() -> tuple[np.ndarray, np.ndarray]:
    """This rank's examples: its share of each batch of EXAMPLES."""
    rank, size = hvd.rank(), hvd.size()
    return tuple(np.concatenate(np.split(array, STEPS * size)[rank::size]) for array in data())  # type: ignore[return-value]


def expected(make_optimizer: type[keras.optimizers.Optimizer]) -> list[np.ndarray]:
    """The weights of one process that trains with all examples."""
    model = small_model(1)
    model.compile(make_optimizer(0.05), "mse")
    model.fit(*data(), batch_size=EXAMPLES, epochs=1, shuffle=False, verbose=0)
    return [np.array(weight) for weight in model.get_weights()]


def fit(make_optimizer: type[keras.optimizers.Optimizer], folder: Path) -> None:
    """Compile and fit; the first batch leaves rank 0's weights on all ranks, so it begins with no step to take."""
    model = small_model(1 + hvd.rank())
    optimizer = hvd_keras.DistributedOptimizer(make_optimizer(0.0))
    model.compile(optimizer, "mse")
    inputs, targets = part()
    callbacks = [hvd_keras.callbacks.BroadcastGlobalVariablesCallback(0), hvd_keras.callbacks.MetricAverageCallback()]
    model.fit(inputs[:1], targets[:1], verbose=0, callbacks=callbacks)
    # A schedule is saved as it is, and two groups reduce what one would.
    schedule = keras.optimizers.schedules.ExponentialDecay(0.05, 1, 1.0)
    model.compile(hvd_keras.DistributedOptimizer(make_optimizer(schedule), groups=2), "mse")
    history = model.fit(
        inputs, targets, batch_size=EXAMPLES // hvd.size(), epochs=1, shuffle=False, verbose=0, callbacks=callbacks[1:]
    )
    check(model.get_weights(), expected(make_optimizer))
    assert len({float(loss) for loss in hvd.allgather_object(history.history["loss"][0])}) == 1
    if hvd.rank() == 0:
        model.save(folder / "model.keras")
        assert type(keras.models.load_model(folder / "model.keras").optimizer) is make_optimizer
    hvd.allreduce(tf.zeros(1), name="the model is saved")
    again = hvd_keras.load_model(folder / "model.keras")
    assert hasattr(again.optimizer, "register_local_var")
    assert int(again.optimizer.iterations) == STEPS


def tape() -> None:
    """A loop of one's own."""
    model = small_model(1 + hvd.rank())
    hvd.broadcast_variables(model.variables, 0)
    optimizer = keras.optimizers.SGD(0.05)
    inputs, targets = (np.split(array, STEPS) for array in part())
    for step in range(STEPS):
        with hvd.DistributedGradientTape(tf.GradientTape()) as gradient_tape:
            loss = tf.reduce_mean((model(inputs[step]) - targets[step]) ** 2)
        optimizer.apply(gradient_tape.gradient(loss, model.trainable_variables), model.trainable_variables)
    check(model.get_weights(), expected(keras.optimizers.SGD))


def refusals() -> None:
    """What Keras 3 does in another way is refused with the remedy."""
    with pytest.raises(ValueError, match="gradient_accumulation_steps=4"):
        hvd_keras.DistributedOptimizer(keras.optimizers.SGD(), backward_passes_per_step=4)
    with pytest.raises(ValueError, match="number of groups"):
        hvd_keras.DistributedOptimizer(keras.optimizers.SGD(), groups=[[]])
    with pytest.raises(ValueError, match="already"):
        hvd_keras.DistributedOptimizer(hvd_keras.DistributedOptimizer(keras.optimizers.SGD()))
    model = small_model(1)
    model.compile(hvd_keras.DistributedOptimizer(keras.optimizers.SGD(momentum=0.9)), "mse")
    warmup = hvd_keras.callbacks.LearningRateWarmupCallback(initial_lr=0.1, warmup_epochs=1)
    with pytest.raises(ValueError, match="momentum_correction=False"):
        model.fit(*part(), verbose=0, callbacks=[warmup])
    warmup = hvd_keras.callbacks.LearningRateWarmupCallback(0.1, warmup_epochs=1, momentum_correction=False)
    model.fit(*part(), batch_size=4, verbose=0, callbacks=[warmup])
    assert abs(float(model.optimizer.learning_rate) - 0.1) < 1e-6


def half_precision() -> None:
    """An overflow on one rank makes all ranks skip the step, where the loss is scaled outside of the average."""
    keras.config.set_dtype_policy("mixed_float16")
    model = small_model(1)
    model.compile(hvd_keras.DistributedOptimizer(keras.optimizers.SGD(0.05)), "mse")
    with pytest.raises(ValueError, match="LossScaleOptimizer"):
        model.fit(*part(), verbose=0)
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05))
    model.compile(hvd_keras.DistributedOptimizer(scaled), "mse")
    inputs, targets = part()
    inputs[3] *= 1e6 if hvd.rank() == 1 else 1
    model.fit(inputs, targets, batch_size=4, shuffle=False, verbose=0)
    state = [keras.ops.convert_to_numpy(value) for value in (*model.weights, *model.optimizer.variables)]
    for of_rank in hvd.allgather_object(state):
        for mine, other in zip(state, of_rank, strict=True):
            np.testing.assert_array_equal(mine, other)
    assert np.isfinite(state[0]).all()


def check(weights: list[np.ndarray], right: list[np.ndarray]) -> None:
    """The weights are those of one process, on all ranks."""
    for weight, one in zip(weights, right, strict=True):
        np.testing.assert_allclose(weight, one, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    hvd.init()
    for number, kind in enumerate((keras.optimizers.SGD, keras.optimizers.Adam)):
        of_kind = Path(sys.argv[1]) / str(number)
        of_kind.mkdir(exist_ok=True)
        fit(kind, of_kind)
    tape()
    refusals()
    half_precision()
    print("all as promised", flush=True)

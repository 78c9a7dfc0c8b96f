"""A Keras script as its author might have written it, and what docs/your-own-script.md makes of it."""

from collections.abc import Sequence
from typing import Any

from common.distributed.topology import Topology
from common.tf import fit
from common.tf.distributed import runtime

import keras
import numpy as np

ALONE = Topology(0, 1, 0, 1)
Data = Sequence[tuple[np.ndarray, np.ndarray]]  # training, test
History = dict[str, list[float]]


def build(layers: Sequence[keras.Layer] = ()) -> keras.Model:
    """The same initial weights on every call; GELU has no kink."""
    keras.utils.set_random_seed(1)
    hidden = layers or [keras.layers.Flatten(), keras.layers.Dense(16, "gelu")]
    return keras.Sequential([keras.Input((28, 28)), *hidden, keras.layers.Dense(10)])


def compile_model(model: keras.Model, optimizer: keras.Optimizer, **options: Any) -> None:
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(3)],
        weighted_metrics=[keras.metrics.SparseCategoricalCrossentropy(from_logits=True)],
        **options,
    )


def batches(data: Data, size: int, topology: Topology, seed: int) -> tuple[fit.ShardedBatches, fit.ShardedBatches]:
    """Training examples, with weights, and test examples."""
    train, test = data
    weights = np.linspace(0.5, 1.5, len(train[1]), dtype=np.float32)
    return (
        fit.ShardedBatches(*train, size, topology, seed=seed, sample_weight=weights),
        fit.ShardedBatches(*test, size, topology, shuffle=False),
    )


def of_one_rank(data: Data, size: int, epochs: int) -> History:
    """Keras alone: nothing of ours but the order of the examples."""
    model = build()
    compile_model(model, keras.optimizers.Adam(1e-2, global_clipnorm=1.0))
    train, test = batches(data, size, ALONE, seed=1)
    history = model.fit(train, shuffle=False, epochs=epochs, validation_data=test, verbose=0)
    return dict(history.history)


def of_all_ranks(data: Data, size: int, epochs: int, exchange: bool = True) -> History:
    """The same on all ranks; without the exchange the ranks train on their own."""
    topology = runtime.init()
    model = build()
    optimizer = keras.optimizers.Adam(1e-2, global_clipnorm=1.0)
    fit.distributed(optimizer)
    if not exchange:
        optimizer.apply = optimizer.apply._apply
    model.layers[-1].bias.assign_add([float(topology.rank)] * 10)  # only rank 0's counts
    compile_model(model, optimizer)
    train, test = batches(data, size, topology, seed=1)
    callback = fit.Synchronise()
    history = model.fit(train, shuffle=False, epochs=epochs, validation_data=test, callbacks=[callback], verbose=0)
    evaluated = model.evaluate(test, callbacks=[callback], verbose=0, return_dict=True)
    last = {name: values[-1] for name, values in history.history.items()}
    assert evaluated == {name: last[f"val_{name}"] for name in evaluated}
    return dict(history.history)

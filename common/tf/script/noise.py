"""Random numbers of a distributed step: this rank's rows of those that one rank would draw for the global batch.

So dropout masks and noise differ between the ranks, and are the same for every number of ranks. Where that costs too
much, as each rank draws for all, a rank draws numbers of its own for its rows alone.
"""

import functools
from collections.abc import Callable
from typing import Any

from common.distributed import noise_kind
from common.distributed.topology import Topology
from common.tf.script import part

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.tensorflow import random as keras_random
from keras.src.random import seed_generator

OTHERS = ("beta", "binomial", "categorical", "gamma", "shuffle")  # their arguments have rows
BY_SHAPE = ("normal", "uniform", "truncated_normal", "randint")


@functools.cache
def install(topology: Topology) -> None:
    """Wraps the functions of keras.random; outside of a distributed step they act as before."""
    for name in BY_SHAPE:
        setattr(keras_random, name, _of_rows(getattr(keras_random, name)))
    for name in OTHERS:
        setattr(keras_random, name, _of_rank_alone(getattr(keras_random, name)))
    keras_random.dropout = _dropout(keras_random.dropout)
    keras_random.draw_seed = _of_rank(keras_random.draw_seed, topology)


def seed_tensorflow(topology: Topology) -> None:
    """Makes tf.random's functions, which cannot be cut by rows, draw other numbers on each rank in the traced graph."""
    seed = tf.compat.v1.get_default_graph().seed if not tf.executing_eagerly() else None
    if seed is not None and topology.rank:
        tf.random.set_seed(int(np.random.SeedSequence((seed, topology.rank)).generate_state(1)[0] // 2))


def state() -> keras.Variable:
    """The state of the generator from which keras.random draws without a seed."""
    return seed_generator.global_seed_generator().state


def _of_rank(draw_seed: Callable[..., Any], topology: Topology) -> Callable[..., Any]:
    @functools.wraps(draw_seed)
    def drawn(seed: Any) -> Any:
        value = draw_seed(seed)
        if part.current() is None or not noise_kind.is_of_rank():
            return value
        other = np.random.SeedSequence(topology.rank).generate_state(2) // 4
        return value + tf.cast(tf.constant(other), value.dtype)

    return drawn


def _of_rank_alone(draw: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
    @functools.wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> tf.Tensor:
        with noise_kind.of_rank():
            return draw(*args, **kwargs)

    return drawn


def _of_rows(draw: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
    @functools.wraps(draw)
    def drawn(shape: Any, *args: Any, **kwargs: Any) -> tf.Tensor:
        of_step = part.current()
        if of_step is None or noise_kind.is_of_rank() or not _may_have_rows(shape):
            return draw(shape, *args, **kwargs)
        num_rows, *others = tf.unstack(shape) if tf.is_tensor(shape) else shape
        num_drawn, rows = _rows(tf.cast(num_rows, tf.int32), of_step)
        return tf.gather(draw((num_drawn, *others), *args, **kwargs), rows)

    return drawn


def _dropout(plain: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
    @functools.wraps(plain)
    def dropout(inputs: tf.Tensor, rate: float, noise_shape: Any = None, seed: Any = None) -> tf.Tensor:
        of_step = part.current()
        if of_step is None or noise_kind.is_of_rank() or rate in (0.0, 1.0):
            return plain(inputs, rate, noise_shape, seed)
        shape = tf.unstack(tf.shape(inputs))
        if noise_shape is not None:
            shape = [own if own is not None else of_inputs for own, of_inputs in zip(noise_shape, shape, strict=True)]
        if not _may_have_rows(shape):
            return plain(inputs, rate, noise_shape, seed)
        num_drawn, rows = _rows(shape[0], of_step)
        ones = tf.ones((num_drawn, *shape[1:]), inputs.dtype)
        return inputs * tf.gather(plain(ones, rate, None, seed), rows)

    return dropout


def _may_have_rows(shape: Any) -> bool:
    """Whether the first dimension is known only when the step runs, as that of a batch is."""
    if tf.is_tensor(shape):
        return tf.executing_eagerly() or tf.get_static_value(shape) is None
    return bool(len(shape)) and (tf.executing_eagerly() or tf.is_tensor(shape[0]))


def _rows(num_rows: tf.Tensor, of_step: part.Part) -> tuple[tf.Tensor, tf.Tensor]:
    """How many rows to draw, and the numbers of this rank's rows among them.

    Up to three rows for each row of the batch are those of tensors that were put one after another (a GAN labels
    generated and real images in one tensor); more are a dimension that was merged with the batch. Other numbers of rows
    do not belong to the batch.
    """
    num_blocks = num_rows // of_step.num_computed
    is_of_batch = (num_blocks * of_step.num_computed == num_rows) & (num_blocks > 0)
    num_drawn = tf.where(is_of_batch, num_blocks * of_step.num_global, num_rows)
    of_block = of_step.first + tf.range(of_step.num_computed)
    in_blocks = tf.range(num_blocks)[:, None] * of_step.num_global + of_block
    merged = of_block[:, None] * num_blocks + tf.range(num_blocks)
    of_batch = tf.where(num_blocks <= 3, tf.reshape(in_blocks, [-1]), tf.reshape(merged, [-1]))
    return num_drawn, tf.cond(is_of_batch, lambda: of_batch, lambda: tf.range(num_rows))

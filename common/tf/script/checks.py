"""Checks in the first step of an epoch, which fail on all ranks before that step changes a weight."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from common.distributed.topology import Topology
from common.errors import ConfigError
from common.tf.script import part

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

OTHER_BATCHES = (
    "the ranks have read other batches than each other: call init(seed=...) before the data are made, and give each "
    "random order in it a seed that is the same on all ranks; a dataset that is already divided among the ranks is "
    "passed as own_batches(dataset)"
)
OF_WHOLE_BATCH = (
    "a loss or metric of a batch is not the mean of those of its parts, as with Dice or the root of a mean, so that "
    "ranks cannot compute it from parts; use one that is a mean over examples"
)
NO_MEANS = (
    "the gradients of a batch that the optimizer gets are not the means of those of its parts, so that ranks cannot "
    "compute them from parts: train_step, compute_loss, add_loss or a layer adds losses up, compares the rows of a "
    "batch with each other, or clips gradients itself; use means over the rows, and clipnorm= of the optimizer"
)


@contextmanager
def refusals(topology: Topology) -> Iterator[None]:
    """Ends the process with status 2 if the ranks cannot train together; rank 0 says why."""
    try:
        yield
    except Exception as error:
        message = _reason(error)
        if not message:
            raise
    else:
        return
    if topology.rank == 0:
        print(message, file=sys.stderr, flush=True)
    sys.exit(2)


def _reason(error: BaseException | None) -> str:
    """Why an exception was raised on all ranks, if it was; TensorFlow may have raised another one in its place."""
    while error is not None:
        if isinstance(error, ConfigError):
            return str(error)
        if isinstance(error, tf.errors.InvalidArgumentError):  # in the graph of a step
            return next((message for message in (OTHER_BATCHES, OF_WHOLE_BATCH, NO_MEANS) if message in str(error)), "")
        error = error.__context__
    return ""


_is_first: list[tf.Variable] = []
_suspects: list[tuple[tf.Tensor, str]] = []


def _first_step() -> tf.Variable:
    if not _is_first:
        with tf.init_scope():
            _is_first.append(tf.Variable(True, trainable=False))
    return _is_first[0]


def begin_epoch() -> None:
    """The next step is the first one of an epoch; all ranks must call it."""
    _first_step().assign(True)


def is_first_step() -> tf.Tensor:
    """() bool, whether the step that runs is the first one of an epoch."""
    return _first_step().read_value()


def begin_step() -> None:
    """Forgets what an earlier step has left, which may have failed."""
    _suspects.clear()


def end_step() -> None:
    """The next step is not the first one."""
    _first_step().assign(False)


def suspect(is_of_whole_batch: tf.Tensor, message: str = OF_WHOLE_BATCH) -> None:
    """Notes, () bool, whether a value of this rank's rows is not the mean of those of its halves, and what to say."""
    _suspects.append((is_of_whole_batch, message))


def check_assigned(known: Sequence[keras.Variable], remedy: str) -> None:
    """Checks that the traced step assigns only to known variables: others would count what does not count.

    Raises:
        ConfigError: it does not.
    """
    if tf.executing_eagerly():
        return
    graph = tf.compat.v1.get_default_graph()
    handles = {id(variable.value.handle) for variable in known}
    others = {id(inner) for outer, inner in graph.captures if id(outer) not in handles}
    for operation in graph.get_operations():
        if operation.type.startswith("Assign") and id(operation.inputs[0]) in others:
            raise ConfigError([f"{operation.name}: the step changes a variable that is no part of the model; {remedy}"])


def check_batch(data: Any) -> list[Any]:
    """Compares the ranks' global batches; returns operations that raise InvalidArgumentError if they differ."""

    def differ() -> tf.Tensor:
        prints = hvd.allgather(_fingerprint(data)[None], name="script.batch")
        return tf.reduce_any(prints != prints[0])

    differs = tf.cond(is_first_step(), differ, lambda: tf.constant(False))
    return _refuse_if(differs, OTHER_BATCHES)


def check_suspects() -> list[Any]:
    """Returns operations that raise InvalidArgumentError if a value so far is one of the whole batch."""
    if not _suspects or part.current() is None:
        return []
    mine = tf.cast(tf.stack([is_of_whole_batch for is_of_whole_batch, _ in _suspects]), tf.float32)
    messages = [message for _, message in _suspects]
    _suspects.clear()

    def found() -> tf.Tensor:
        return hvd.allreduce(mine, op=hvd.Sum, name="script.suspects") > 0

    are_wrong = tf.cond(is_first_step(), found, lambda: tf.zeros(len(messages), tf.bool))
    return [
        operation
        for message in dict.fromkeys(messages)
        for operation in _refuse_if(tf.reduce_any(are_wrong & [each == message for each in messages]), message)
    ]


def _refuse_if(condition: tf.Tensor, message: str) -> list[Any]:
    """The operations; none if the condition was checked at once."""
    operation = tf.debugging.assert_equal(condition, False, message)
    return [] if operation is None else [operation]


def _fingerprint(data: Any) -> tf.Tensor:
    """() int64 that depends on all values of a batch."""
    total = tf.zeros((), tf.int64)
    for value in keras.tree.flatten(data):
        if value is not None:
            dense = value.flat_values if isinstance(value, tf.RaggedTensor) else value
            dense = dense.values if isinstance(dense, tf.SparseTensor) else dense
            total = 31 * total + tf.strings.to_hash_bucket_fast(tf.io.serialize_tensor(dense), 2**31 - 1)
    return total

"""Horovod's start, and the collectives and checks of a TensorFlow run."""

import hashlib
import json
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from common.config.schema import PrecisionConfig
from common.distributed import array_exchange, consensus, launcher_env
from common.distributed.array_exchange import Arrays
from common.distributed.topology import Topology
from common.errors import ConfigError

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
from horovod.common.elastic import notification_manager
from horovod.common.exceptions import HorovodInternalError

_process_sets: dict[tuple[int, ...], hvd.ProcessSet] = {}


class Optimizer(Protocol):
    """The part of the interface of keras.Optimizer that training needs."""

    @property
    def learning_rate(self) -> Any:
        """The variable of the learning rate."""

    @property
    def variables(self) -> Any:
        """The state that is the same on all ranks with the same weights."""

    def apply(self, gradients: Sequence[tf.Tensor], variables: Sequence[keras.Variable]) -> Any:
        """Updates the weights once."""


def init(process_sets: Iterable[Sequence[int]] = (), reproducible: bool = False) -> Topology:
    """Starts Horovod if it is not running, and limits this rank's threads and GPUs; without horovodrun: a single rank.

    Args:
        process_sets: the proper subsets of the ranks that will communicate; the same list on all ranks.
        reproducible: operations give the same bits each time, also where other hosts or ranks compute them: with one
            thread, as several cut sums by their number.

    Raises:
        ConfigError: Horovod runs already, and TensorFlow with several threads.
    """
    if hvd.is_initialized():
        if reproducible and tf.config.threading.get_intra_op_parallelism_threads() != 1:
            raise ConfigError(
                ["train.reproducible=true: TensorFlow has started with several threads; call init before"]
            )
        return _topology()
    if reproducible:
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.experimental.enable_op_determinism()
    _process_sets.update((tuple(ranks), hvd.ProcessSet(list(ranks))) for ranks in process_sets)
    launcher_env.set_defaults(bool(_process_sets))
    hvd.init(process_sets=list(_process_sets.values()))
    topology = _topology()
    if topology.world_size == 1:
        launcher_env.refuse_other_launchers()
    num_threads = launcher_env.num_threads(topology)
    if "TF_NUM_INTRAOP_THREADS" not in os.environ and not reproducible:
        tf.config.threading.set_intra_op_parallelism_threads(num_threads)
    if "TF_NUM_INTEROP_THREADS" not in os.environ:
        tf.config.threading.set_inter_op_parallelism_threads(num_threads)
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        _take_gpu(gpus, topology)
    return topology


def _take_gpu(gpus: Sequence[Any], topology: Topology) -> None:
    """Hides all GPUs except for this rank's; a process may see all GPUs of its host, or only one."""
    number = topology.local_rank % len(gpus)
    tf.config.set_visible_devices(gpus[number], "GPU")
    name = f"{socket.gethostname()} {os.environ.get('CUDA_VISIBLE_DEVICES')} {number}"
    launcher_env.say_who_shares(allgather_object(name), topology.rank)


def _topology() -> Topology:
    return Topology(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size())


def process_set(ranks: Sequence[int]) -> hvd.ProcessSet:
    """The process set of these ranks: all ranks, or a subset that was given to init()."""
    return hvd.global_process_set if len(ranks) == hvd.size() else _process_sets[tuple(ranks)]


def shutdown() -> None:
    """Ends Horovod on all ranks."""
    hvd.shutdown()


def seed(number: int) -> None:
    """Seeds the random numbers for the initial weights, the same on all ranks."""
    keras.utils.set_random_seed(_seed(number, 0, 0))


def seed_dropout(model: keras.Model, number: int, part: int, step: int) -> None:
    """Seeds dropout in a step on a part of its batch: a rank's or a lane's."""
    for place, state in enumerate(model.non_trainable_variables):
        if state.path.endswith("seed_generator_state"):
            state.assign([_seed(number, part, step), place])


def _seed(number: int, part: int, step: int) -> int:
    return int(np.random.SeedSequence((number, part, step)).generate_state(1)[0])


def to_tensor(array: np.ndarray, cfg: PrecisionConfig) -> tf.Tensor:
    """The array as a tensor, in the run's dtype if it is floating-point."""
    return tf.constant(array, cfg.dtype.name if np.issubdtype(array.dtype, np.floating) else array.dtype)


def to_tensors(arrays: Iterable[np.ndarray], cfg: PrecisionConfig) -> list[tf.Tensor]:
    """The arrays as tensors, floating-point ones in the run's dtype."""
    return [to_tensor(array, cfg) for array in arrays]


def allgather_object(value: Any) -> list[Any]:
    """Returns every rank's value, in the order of ranks, on all ranks; values are JSON values."""
    content = tf.constant(np.frombuffer(json.dumps(value).encode(), np.uint8))
    sizes = hvd.allgather(tf.constant([len(content)]), name="allgather_object.sizes")
    parts = tf.split(hvd.allgather(content, name="allgather_object.content"), sizes)
    return [json.loads(part.numpy().tobytes()) for part in parts]


def raise_on_all_ranks() -> AbstractContextManager[None]:
    """If a check fails on one rank in this block, every rank raises its error (common/distributed/consensus.py)."""
    return consensus.raise_on_all_ranks(allgather_object)


def check_alike(facts: Mapping[str, Any]) -> None:
    """Raises a ConfigError on all ranks if they were not started alike (common/training/provenance.py)."""
    num_threads = int(
        os.environ.get("TF_NUM_INTRAOP_THREADS") or tf.config.threading.get_intra_op_parallelism_threads()
    )
    consensus.check_alike({**facts, "number of threads": num_threads}, allgather_object)


def broadcast_object(value: Any) -> Any:
    """Returns rank 0's JSON value on all ranks."""
    return allgather_object(value)[0]


def sum_over_ranks(*values: float | tf.Tensor) -> list[float]:
    """The sum of each value over all ranks, computed in float64."""
    doubles = tf.stack([tf.cast(value, tf.float64) for value in values])
    sums: list[float] = hvd.allreduce(doubles, name="sum_over_ranks", op=hvd.Sum).numpy().tolist()
    return sums


def broadcast_state(
    model: keras.Model,
    optimizer: keras.Optimizer,
    others: Iterable[tf.Variable] = (),
    ranks: Sequence[int] | None = None,
) -> None:
    """Broadcasts the first rank's weights, optimizer state, learning rate and others; one message per dtype.

    Args:
        model: the model with the weights.
        optimizer: the optimizer of the model.
        others: further variables, with the same shapes on all ranks.
        ranks: a group of ranks whose optimizers are already built. None: all ranks, and the optimizer is built if it is
            not.
    """
    if ranks is None:
        ranks = range(hvd.size())
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
    if len(ranks) == 1:
        return
    broadcast_variables([*model.weights, *optimizer.variables, *others], ranks)


def broadcast_variables(variables: Iterable[keras.Variable | tf.Variable], ranks: Sequence[int] | None = None) -> None:
    """Gives all ranks, or a group, the values of the first one; one message per dtype.

    Args:
        variables: with the same shapes on all ranks.
        ranks: a group of ranks; None: all.
    """
    ranks = range(hvd.size()) if ranks is None else ranks
    by_dtype: dict[tf.DType, list[Any]] = {}
    for variable in variables:
        by_dtype.setdefault(tf.as_dtype(variable.dtype), []).append(variable)
    for dtype, same in by_dtype.items():
        tensors = [tf.convert_to_tensor(variable) for variable in same]
        flat = tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], axis=0)
        flat = hvd.broadcast(flat, ranks[0], name=f"state.{dtype.name}", process_set=process_set(ranks))
        parts = tf.split(flat, [tensor.shape.num_elements() for tensor in tensors])
        for variable, part in zip(same, parts, strict=True):
            variable.assign(tf.reshape(part, variable.shape))


def exchange_arrays(outgoing: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
    """Sends named arrays to each rank; returns the arrays received from each rank."""
    return array_exchange.exchange(outgoing, _alltoall, allgather_object)


def _alltoall(contents: Sequence[bytes]) -> list[bytes]:
    values = tf.constant(np.frombuffer(b"".join(contents), np.uint8))
    received, sizes = hvd.alltoall(values, splits=[len(content) for content in contents], name="exchange_arrays")
    return [part.numpy().tobytes() for part in tf.split(received, sizes)]


def assert_weights_in_sync(model: keras.Model, groups: Sequence[Sequence[int]] | None = None) -> str:
    """Checks that the weights of all ranks, or of each group, are equal bit by bit; returns a SHA-256 of all groups.

    Raises:
        TrainingError: the weights differ.
    """
    digest = hashlib.sha256()
    for weight in model.weights:
        digest.update(weight.numpy().tobytes())
    return consensus.assert_weights_in_sync_in_groups(
        digest.hexdigest(), groups or [range(hvd.size())], allgather_object
    )


def listen_to_launcher(listener: Any) -> None:
    """Lets an elastic launcher call listener.on_hosts_updated(timestamp, change) when hosts come or go."""
    notification_manager.init()
    notification_manager.register_listener(listener)


def is_lost_rank(error: BaseException) -> bool:
    """Whether the error means that another rank has exited."""
    return isinstance(error, HorovodInternalError | tf.errors.OpError) and consensus.is_lost_rank(error)

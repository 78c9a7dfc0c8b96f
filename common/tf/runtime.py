"""Starts and steadies the ranks of a TensorFlow run."""

import hashlib
import json
import os
import socket
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from common import agreement, array_exchange, host, provenance
from common.array_exchange import Arrays
from common.config import PrecisionConfig, RunConfig
from common.topology import Topology

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
from horovod.common.exceptions import HorovodInternalError

_process_sets: dict[tuple[int, ...], hvd.ProcessSet] = {}


def init(process_sets: Iterable[Sequence[int]] = ()) -> Topology:
    """Starts Horovod, if it has not been, and gives this rank its share of the cores; without horovodrun: one rank.

    Args:
        process_sets: ranks that will exchange something among themselves; the same on all ranks.
    """
    if hvd.is_initialized():
        return _topology()
    _process_sets.update((tuple(ranks), hvd.ProcessSet(list(ranks))) for ranks in process_sets)
    host.set_cycle_time(bool(_process_sets))
    hvd.init(process_sets=list(_process_sets.values()))
    topology = _topology()
    if topology.world_size == 1:
        host.refuse_other_launchers()
    num_threads = topology.num_threads(host.num_cores())
    if "TF_NUM_INTRAOP_THREADS" not in os.environ:
        tf.config.threading.set_intra_op_parallelism_threads(num_threads)
    if "TF_NUM_INTEROP_THREADS" not in os.environ:
        tf.config.threading.set_inter_op_parallelism_threads(num_threads)
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        _take_gpu(gpus, topology)
    return topology


def _take_gpu(gpus: Sequence[Any], topology: Topology) -> None:
    """Hides all GPUs but this rank's; a task may see all of its host, or its own alone."""
    number = topology.local_rank % len(gpus)
    tf.config.set_visible_devices(gpus[number], "GPU")
    name = f"{socket.gethostname()} {os.environ.get('CUDA_VISIBLE_DEVICES')} {number}"
    host.say_who_shares(gather_json(name), topology.rank)


def _topology() -> Topology:
    return Topology(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size())


def process_set(ranks: Sequence[int]) -> hvd.ProcessSet:
    """All ranks, or some that were named to init()."""
    return hvd.global_process_set if len(ranks) == hvd.size() else _process_sets[tuple(ranks)]


def shutdown() -> None:
    """Ends Horovod on all ranks."""
    hvd.shutdown()


def seed(number: int, topology: Topology) -> None:
    """Seeds this rank's random numbers, which decide the initial weights, alike on all ranks."""
    keras.utils.set_random_seed(_seed(number, topology, 0))


def seed_dropout(model: keras.Model, number: int, topology: Topology, step: int) -> None:
    """Makes this rank's dropout of a step a matter of the seed and the step alone."""
    for place, state in enumerate(model.non_trainable_variables):
        if state.path.endswith("seed_generator_state"):
            state.assign([_seed(number, topology, step), place])


def _seed(number: int, topology: Topology, step: int) -> int:
    return int(np.random.SeedSequence((number, topology.rank if step else 0, step)).generate_state(1)[0])


def to_tensor(array: np.ndarray, cfg: PrecisionConfig) -> tf.Tensor:
    """The array as a tensor; in the run's dtype when it is floating-point."""
    return tf.constant(array, cfg.dtype.name if np.issubdtype(array.dtype, np.floating) else array.dtype)


def to_tensors(arrays: Iterable[np.ndarray], cfg: PrecisionConfig) -> list[tf.Tensor]:
    """The arrays as tensors; floating-point ones in the run's dtype."""
    return [to_tensor(array, cfg) for array in arrays]


def gather_json(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks, on all ranks; values are what JSON can hold."""
    content = tf.constant(np.frombuffer(json.dumps(value).encode(), np.uint8))
    sizes = hvd.allgather(tf.constant([len(content)]), name="gather_json.sizes")
    parts = tf.split(hvd.allgather(content, name="gather_json.content"), sizes)
    return [json.loads(part.numpy().tobytes()) for part in parts]


def joint_check() -> AbstractContextManager[None]:
    """A block that all ranks leave without an error, or all with the ConfigErrors of all (common/agreement.py)."""
    return agreement.joint_check(gather_json)


def check_alike(cfg: RunConfig, fingerprint: str) -> None:
    """Raises a ConfigError on all ranks where they were not started alike (common/provenance.py)."""
    num_threads = int(
        os.environ.get("TF_NUM_INTRAOP_THREADS") or tf.config.threading.get_intra_op_parallelism_threads()
    )
    agreement.check_alike(provenance.facts(cfg, fingerprint, num_threads), gather_json)


def from_rank_zero(value: Any) -> Any:
    """Rank 0's value on all ranks."""
    return gather_json(value)[0]


def sum_over_ranks(*values: float | tf.Tensor) -> list[float]:
    """The sum of each value over all ranks, in double precision."""
    doubles = tf.stack([tf.cast(value, tf.float64) for value in values])
    sums: list[float] = hvd.allreduce(doubles, name="sum_over_ranks", op=hvd.Sum).numpy().tolist()
    return sums


def broadcast_state(
    model: keras.Model,
    optimizer: keras.Optimizer,
    others: Iterable[tf.Variable] = (),
    ranks: Sequence[int] | None = None,
) -> None:
    """Gives all ranks the first one's weights, optimizer state, learning rate and others, a message per dtype.

    A rank may have no optimizer state yet: it gets what rank 0 has.

    Args:
        model: whose weights they are.
        optimizer: of the model.
        others: variables that all ranks have, alike in shape.
        ranks: some that have optimizers with the same state already, of which only the values are sent.
    """
    if ranks is None:
        ranks = range(hvd.size())
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
    if len(ranks) == 1:
        return
    variables = [*model.weights, *optimizer.variables, *others]
    for dtype in {tf.as_dtype(variable.dtype): None for variable in variables}:
        same = [variable for variable in variables if tf.as_dtype(variable.dtype) == dtype]
        tensors = [tf.convert_to_tensor(variable) for variable in same]
        flat = tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], axis=0)
        flat = hvd.broadcast(flat, ranks[0], name=f"state.{dtype.name}", process_set=process_set(ranks))
        parts = tf.split(flat, [tensor.shape.num_elements() for tensor in tensors])
        for variable, part in zip(same, parts, strict=True):
            variable.assign(tf.reshape(part, variable.shape))


def exchange_arrays(outgoing: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
    """Sends named arrays to each rank, by its number; returns those that came from each."""
    return array_exchange.exchange(outgoing, _alltoall, gather_json)


def _alltoall(contents: Sequence[bytes]) -> list[bytes]:
    values = tf.constant(np.frombuffer(b"".join(contents), np.uint8))
    received, sizes = hvd.alltoall(values, splits=[len(content) for content in contents], name="exchange_arrays")
    return [part.numpy().tobytes() for part in tf.split(received, sizes)]


def check_in_sync(model: keras.Model, groups: Sequence[Sequence[int]] | None = None) -> str:
    """Compares the weights of all ranks, or of those in each group, bit by bit; returns a SHA-256 of all groups'.

    Raises:
        TrainingError: they differ.
    """
    digest = hashlib.sha256()
    for weight in model.weights:
        digest.update(weight.numpy().tobytes())
    return agreement.same_in_groups(digest.hexdigest(), groups or [range(hvd.size())], gather_json)


def is_lost_rank(error: BaseException) -> bool:
    """Whether the error says that another rank has left the job."""
    return isinstance(error, HorovodInternalError | tf.errors.OpError) and agreement.is_lost_rank(error)

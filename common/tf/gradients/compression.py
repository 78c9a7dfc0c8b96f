"""The base classes of gradient compressors in TensorFlow: the exchanges, and the wrappers of any method.

A method is the class Compressor in common/tf/gradients/compressors/<method>.py; common/gradients/compression.py has
its reference in numpy.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from common.config.schema import CompressionConfig, DGCConfig, LossyConfig, SparseConfig, WireValues
from common.distributed.topology import Topology
from common.gradients.bucketing import allreduce_bytes
from common.gradients.compression import CHUNK, GROUP, chunk_sizes, compressor_class, largest_half, piece_size
from common.tf.distributed import runtime

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

Random = Callable[[Sequence[int]], tf.Tensor]
"""Shape -> uniform random float32 in [0, 1), different at each call."""


class Communicator:
    """Sends the messages of one bucket to the other ranks of a process set.

    Attributes:
        rank: this rank's number in the set; -1 outside of it.
        size: number of ranks in the set.
        num_bytes: bytes that this rank has sent in the last exchange, by the formulas of docs/compression.md.
    """

    def __init__(self, name: str, process_set: hvd.ProcessSet) -> None:
        self._name, self._process_set = name, process_set
        # A rank outside the set has a communicator, too, but does not use it.
        self.rank = process_set.rank() if process_set.included() else -1
        self.size = len(process_set.ranks)
        self.begin()

    def begin(self) -> None:
        """Begins a new exchange."""
        self.num_bytes: tf.Tensor | int = 0
        self._num_messages = 0

    def allreduce(self, values: tf.Tensor) -> tf.Tensor:
        """The sums over the ranks of values (...), float16, float32 or float64."""
        num_bytes = allreduce_bytes(values.shape.num_elements() * values.dtype.size, self.size)
        return hvd.allreduce(values, op=hvd.Sum, **self._sent(num_bytes))

    def alltoall(self, rows: tf.Tensor) -> tf.Tensor:
        """Sends row r of (ranks, ...) to rank r; row r of the result comes from rank r."""
        num_bytes = rows.shape[1:].num_elements() * rows.dtype.size * (self.size - 1)
        return tf.ensure_shape(hvd.alltoall(rows, **self._sent(num_bytes)), rows.shape)

    def allgather(self, values: tf.Tensor) -> tf.Tensor:
        """Concatenates the values (k, ...) of all ranks."""
        num_bytes = tf.size(values) * values.dtype.size * (self.size - 1)
        return hvd.allgather(values, **self._sent(num_bytes))

    def broadcast(self, values: tf.Tensor) -> tf.Tensor:
        """The values of the set's first rank; counts the bytes that the root of a binary tree sends."""
        num_bytes = values.shape.num_elements() * values.dtype.size * math.ceil(math.log2(self.size))
        sent = self._sent(num_bytes if self.rank == 0 else 0)
        return tf.ensure_shape(hvd.broadcast(values, self._process_set.ranks[0], **sent), values.shape)

    def _sent(self, num_bytes: tf.Tensor | int) -> dict[str, Any]:
        """Counts a message and gives it a unique name, the same in each step, by which Horovod recognises it."""
        self.num_bytes += num_bytes
        self._num_messages += 1
        return {"name": f"{self._name}.{self._num_messages}", "process_set": self._process_set}


@dataclass(frozen=True)
class CompressionGroup:
    """Gradients that are compressed as one vector of n values.

    Attributes:
        number: number of the group in the model.
        shapes: the shapes of its gradients, which lie one after another in the vector.
        communicator: sends the compressed values.
        seed: the seed of random numbers.
    """

    number: int
    shapes: Sequence[tuple[int, ...]]
    communicator: Communicator
    seed: int

    @property
    def lengths(self) -> list[int]:
        """Number of values of each gradient."""
        return [math.prod(shape) for shape in self.shapes]

    def random(self, step: tf.Tensor, rank: int = 0) -> Random:
        """The random numbers of a step and rank; with rank=0, the default, they are the same on all ranks."""
        stream = int(np.random.SeedSequence((self.seed, self.number, rank)).generate_state(1)[0])
        calls = iter(range(GROUP))

        def draw(shape: Sequence[int]) -> tf.Tensor:
            return tf.random.stateless_uniform(shape, tf.stack([stream, GROUP * tf.cast(step, tf.int64) + next(calls)]))

        return draw

    def new_variable(self) -> tf.Variable:
        """A variable of zeros (n,) float32."""
        return tf.Variable(tf.zeros(sum(self.lengths)), trainable=False)

    def split(self, values: tf.Tensor) -> list[tf.Tensor]:
        """Splits a vector (n,) into tensors with the shapes of the gradients."""
        return [
            tf.reshape(part, shape) for part, shape in zip(tf.split(values, self.lengths), self.shapes, strict=True)
        ]


class Exchanged(NamedTuple):
    """The result of an exchange.

    Attributes:
        summed: (n,) the sum over the ranks.
        error: (n,) this rank's error; () if there is none.
        state: the new values of the compressor's variables, which are assigned unless the step is skipped.
        num_bytes: () the number of bytes that this rank has sent.
    """

    summed: tf.Tensor
    error: tf.Tensor
    state: Sequence[tf.Tensor]
    num_bytes: tf.Tensor


class Compressor(ABC):
    """A method to sum the gradients of a compression group over the ranks.

    Attributes:
        state: the state, by its names in a checkpoint: one variable (n,) for the whole group, or a list with one
            variable per gradient.
    """

    def __init__(self, cfg: CompressionConfig, group: CompressionGroup) -> None:
        self.group = group
        self.state: dict[str, tf.Variable | list[tf.Variable]] = {}

    @abstractmethod
    def exchange(self, values: tf.Tensor, step: tf.Tensor) -> Exchanged:
        """Sums values (n,) over the ranks of group.communicator. Steps count from 0."""

    @property
    def variables(self) -> list[tf.Variable]:
        """All variables of the state, in order."""
        return tf.nest.flatten(list(self.state.values()))

    def state_by_gradient(self) -> dict[str, list[tf.Tensor]]:
        """The state by name: one tensor per gradient of the group."""
        return {
            name: [variable.value() for variable in values] if isinstance(values, list) else self.group.split(values)
            for name, values in self.state.items()
        }

    def load(self, state: Mapping[str, Sequence[np.ndarray]]) -> None:
        """Loads the result of state_by_gradient()."""
        for name, values in self.state.items():
            if isinstance(values, list):
                for variable, array in zip(values, state[name], strict=True):
                    variable.assign(array)
            else:
                values.assign(np.concatenate([part.reshape(-1) for part in state[name]]))

    def exchanged(self, summed: tf.Tensor, error: tf.Tensor, state: Sequence[tf.Tensor] = ()) -> Exchanged:
        """The result, with the number of bytes that the communicator has sent."""
        num_bytes = tf.cast(self.group.communicator.num_bytes, tf.float64)
        return Exchanged(tf.ensure_shape(summed, [None]), error, list(state), num_bytes)


class Dense(Compressor):
    """Sums values without compression."""

    def exchange(self, values: tf.Tensor, step: tf.Tensor) -> Exchanged:
        """One allreduce of the gradients and of scalars appended to them, whose bytes are not counted."""
        summed = self.group.communicator.allreduce(values)
        num_bytes = allreduce_bytes(sum(self.group.lengths) * values.dtype.size, self.group.communicator.size)
        return Exchanged(summed, tf.zeros(()), [], tf.constant(num_bytes, tf.float64))


class Codec(Compressor):
    """A dense code that is exchanged in two phases."""

    @abstractmethod
    def encode(self, pieces: tf.Tensor, random: Random) -> tf.Tensor:
        """The codes (K, bytes) uint8 of K pieces (K, P) float32."""

    @abstractmethod
    def decode(self, codes: tf.Tensor, size: int) -> tf.Tensor:
        """The pieces (K, P) float32 of codes (K, bytes), P = size."""

    def exchange(self, values: tf.Tensor, step: tf.Tensor) -> Exchanged:
        """See common/gradients/compression.py, two_phases()."""
        communicator = self.group.communicator
        num_values, me = values.shape[0], communicator.rank
        size = piece_size(num_values, communicator.size)
        pieces = tf.reshape(padded(values, communicator.size * size), (communicator.size, size))
        random = self.group.random(step, me + 1)
        codes = self.encode(pieces, random)
        rows = tf.unstack(self.decode(communicator.alltoall(codes), size))
        rows[me] = pieces[me]
        total = tf.cumsum(tf.stack(rows))[-1]  # in the order of ranks; TensorFlow reorders other forms of the sum
        code = self.encode(total[None], random)
        errors = tf.unstack(pieces - self.decode(codes, size))
        errors[me] = total - self.decode(code, size)[0]
        gathered = tf.ensure_shape(communicator.allgather(code), codes.shape)
        summed = self.decode(gathered, size)
        return self.exchanged(tf.reshape(summed, [-1])[:num_values], tf.concat(errors, 0)[:num_values])


class ScaledCodec(Codec):
    """Integers of a few bits with a float32 scale for each CHUNK of values; see common/gradients/compression.py."""

    bits: int

    @abstractmethod
    def quantize(self, chunks: tf.Tensor, sizes: np.ndarray, random: Random) -> tuple[tf.Tensor, tf.Tensor]:
        """Scales (K, C) and integers (K, C, CHUNK) for chunks (K, C, CHUNK), zero beyond their sizes (C,) float64."""

    @abstractmethod
    def dequantize(self, scales: tf.Tensor, integers: tf.Tensor) -> tf.Tensor:
        """Values (K, C, CHUNK) for scales (K, C, 1) and integers (K, C, CHUNK), all float32."""

    def encode(self, pieces: tf.Tensor, random: Random) -> tf.Tensor:
        """The scales, followed by the packed integers."""
        num_pieces, size = pieces.shape
        sizes = chunk_sizes(size)
        chunks = tf.reshape(padded(pieces, len(sizes) * CHUNK), (num_pieces, len(sizes), CHUNK))
        scales, integers = self.quantize(chunks, sizes, random)
        return tf.concat([as_bytes(scales), pack(tf.reshape(integers, (num_pieces, -1))[:, :size], self.bits)], 1)

    def decode(self, codes: tf.Tensor, size: int) -> tf.Tensor:
        """The float32 values of the scales and integers."""
        num_chunks = math.ceil(size / CHUNK)
        scales, packed = codes[:, : 4 * num_chunks], codes[:, 4 * num_chunks :]
        integers = padded(unpack(packed, self.bits), num_chunks * CHUNK)
        shape = (codes.shape[0], num_chunks, CHUNK)
        integers = tf.cast(tf.reshape(integers, shape), tf.float32)
        values = self.dequantize(from_bytes(scales, tf.float32)[..., None], integers)
        return tf.reshape(values, (codes.shape[0], -1))[:, :size]


class Sparse(Compressor):
    """Some of the values, with their indices, by allgather."""

    def __init__(self, cfg: SparseConfig, group: CompressionGroup) -> None:
        super().__init__(cfg, group)
        self.dtype = wire_dtype(cfg.values)

    @abstractmethod
    def choose(self, values: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        """The indices (k,) int32 of the values (n,) to send; k is the same on all ranks."""

    def exchange(self, values: tf.Tensor, step: tf.Tensor) -> Exchanged:
        """Sends int32 indices and values."""
        indices = self.choose(values, step)
        sent = to_wire(tf.gather(values, indices), self.dtype)
        message = tf.concat([as_bytes(indices[None]), as_bytes(sent[None])], 1)
        received = self.group.communicator.allgather(message)
        summed = tf.zeros_like(values)
        for rank in range(self.group.communicator.size):
            theirs = from_bytes(received[rank : rank + 1, : 4 * tf.size(indices)], tf.int32)[0]
            added = from_bytes(received[rank : rank + 1, 4 * tf.size(indices) :], self.dtype)[0]
            summed = scatter_add(summed, theirs, tf.cast(added, tf.float32))
        return self.exchanged(summed, scatter_add(values, indices, -tf.cast(sent, tf.float32)))


class Adasum(Compressor):
    """Adaptive summation of the ranks' gradients, in two phases; the dot products of a round are one message."""

    def exchange(self, values: tf.Tensor, step: tf.Tensor) -> Exchanged:
        """See common/gradients/compression.py, adasum(); values are the mean gradient of this rank's examples."""
        communicator = self.group.communicator
        num_values = values.shape[0]
        size = piece_size(num_values, communicator.size)
        # The gradient that each value belongs to; the padding at the end counts as another gradient.
        lengths = [*self.group.lengths, communicator.size * size - num_values]
        gradient = np.repeat(np.arange(len(lengths)), lengths).reshape(communicator.size, size)[communicator.rank]
        level = tf.unstack(
            communicator.alltoall(tf.reshape(padded(values, communicator.size * size), (communicator.size, size)))
        )
        while len(level) > 1:
            pairs = [level[first : first + 2] for first in range(0, len(level) - 1, 2)]
            doubles = [[tf.cast(row, tf.float64) for row in pair] for pair in pairs]
            products = tf.stack([x * y for a, b in doubles for x, y in ((a, b), (a, a), (b, b))], axis=1)
            sums = communicator.allreduce(tf.math.unsorted_segment_sum(products, gradient, len(lengths)))
            combined = []
            for (a, b), of_pair in zip(pairs, tf.split(tf.transpose(sums), len(pairs)), strict=True):
                dot, a_squares, b_squares = tf.unstack(of_pair)
                first, second = (1 - tf.math.divide_no_nan(dot, 2 * squares) for squares in (a_squares, b_squares))
                first, second = (tf.gather(tf.cast(weights, values.dtype), gradient) for weights in (first, second))
                combined.append(first * a + second * b)
            level = combined + level[2 * len(pairs) :]
        summed = tf.ensure_shape(communicator.allgather(level[0]), [communicator.size * size])
        return self.exchanged(summed[:num_values], tf.zeros(()))


class ErrorFeedback(Compressor):
    """Adds the error of the last exchange to the values of the next one."""

    def __init__(self, inner: Compressor) -> None:
        super().__init__(CompressionConfig("error_feedback"), inner.group)
        self._inner = inner
        self._residual = inner.group.new_variable()
        self.state = {"residual": self._residual, **inner.state}

    def exchange(self, values: tf.Tensor, step: tf.Tensor) -> Exchanged:
        """Exchanges the corrected values."""
        result = self._inner.exchange(values + self._residual, step)
        return result._replace(state=[result.error, *result.state])


class TwoLevel(Compressor):
    """Sums uncompressed within a host; the first ranks of the hosts exchange the compressed sums."""

    def __init__(self, inner: Compressor, host: Communicator, is_first: bool) -> None:
        super().__init__(CompressionConfig("two_level"), inner.group)
        self._inner, self._host, self._is_first = inner, host, is_first
        self.state = inner.state

    def exchange(self, values: tf.Tensor, step: tf.Tensor) -> Exchanged:
        """Allreduce within the host, the inner exchange between hosts, broadcast within the host."""
        self._host.begin()
        zero = tf.zeros((), tf.float64)
        of_host = self._host.allreduce(values)
        result = Exchanged(of_host, tf.zeros(()), [variable.value() for variable in self.variables], zero)
        if self._is_first:
            result = self._inner.exchange(of_host, step)
        summed = self._host.broadcast(tf.ensure_shape(result.summed, values.shape))
        return result._replace(summed=summed, num_bytes=result.num_bytes + tf.cast(self._host.num_bytes, tf.float64))


class PlainMomentum:
    """With DGC, the momentum of weights whose gradients are not compressed; it replaces the optimizer's momentum.

    Args:
        momentum: the factor on the velocity.
        shapes: the shapes of the gradients, by index.

    Attributes:
        velocities: the velocities, by index; the same on all ranks.
    """

    def __init__(self, momentum: float, shapes: Mapping[int, tuple[int, ...]]) -> None:
        self._momentum = momentum
        self.velocities = {index: tf.Variable(tf.zeros(shape), trainable=False) for index, shape in shapes.items()}

    def apply(self, gradients: Sequence[tf.Tensor], is_skipped: tf.Tensor) -> list[tf.Tensor]:
        """Updates the velocities; returns the gradients of all variables, some replaced by their velocities."""
        results = list(gradients)
        for index, velocity in self.velocities.items():
            results[index] = self._momentum * velocity + gradients[index]
            velocity.assign(tf.where(is_skipped, velocity, results[index]))
        return results

    def state(self) -> dict[int, tf.Tensor]:
        """The velocities by index."""
        return {index: velocity.value() for index, velocity in self.velocities.items()}

    def load(self, state: Mapping[int, np.ndarray]) -> None:
        """Loads the result of state_by_gradient()."""
        for index, velocity in self.velocities.items():
            velocity.assign(state[index])


def build(cfg: LossyConfig, group: CompressionGroup, topology: Topology) -> Compressor:
    """The configured compressor, with error feedback and the two-level exchange around it if configured."""
    compressor: Compressor = compressor_class("tf", cfg.name)(cfg, group)
    if cfg.error_feedback and not isinstance(cfg, DGCConfig):  # DGC has a residual already
        compressor = ErrorFeedback(compressor)
    if cfg.two_level:
        host = Communicator(f"gradients.{group.number}.host", runtime.process_set(topology.ranks_of_host))
        compressor = TwoLevel(compressor, host, topology.local_rank == 0)
    return compressor


def pack(integers: tf.Tensor, bits: int) -> tf.Tensor:
    """(K, P) integers below 2 ** bits -> (K, P * bits / 8) uint8; see common/gradients/compression.py."""
    num_rows, size = integers.shape
    eighths = tf.cast(tf.reshape(integers, (num_rows, GROUP, size // GROUP)), tf.int64)
    shifts = bits * tf.range(GROUP, dtype=tf.int64)[:, None]
    words = tf.reduce_sum(tf.bitwise.left_shift(eighths, shifts), axis=1)
    return tf.reshape(tf.bitcast(words, tf.uint8)[..., :bits], (num_rows, size // GROUP * bits))


def unpack(packed: tf.Tensor, bits: int) -> tf.Tensor:
    """The integers that were given to pack(), as int64."""
    num_rows, size = packed.shape
    words = tf.bitcast(padded(tf.reshape(packed, (num_rows, size // bits, bits)), GROUP), tf.int64)
    shifts = bits * tf.range(GROUP, dtype=tf.int64)[:, None]
    eighths = tf.bitwise.bitwise_and(tf.bitwise.right_shift(words[:, None], shifts), 2**bits - 1)
    return tf.reshape(eighths, (num_rows, size // bits * GROUP))


def as_bytes(rows: tf.Tensor) -> tf.Tensor:
    """(K, n) of any dtype -> (K, bytes) uint8."""
    size = None if rows.shape[1] is None else rows.shape[1] * rows.dtype.size
    return tf.ensure_shape(tf.reshape(tf.bitcast(rows, tf.uint8), (rows.shape[0], -1)), (rows.shape[0], size))


def from_bytes(rows: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """(K, bytes) uint8 -> (K, n) of the dtype."""
    return tf.bitcast(tf.reshape(rows, (tf.shape(rows)[0], -1, dtype.size)), dtype)


def scatter_add(values: tf.Tensor, indices: tf.Tensor, added: tf.Tensor) -> tf.Tensor:
    """The values (n,) with `added` (k,) added at the indices `indices` (k,)."""
    return tf.tensor_scatter_nd_add(values, indices[:, None], added)


def wire_dtype(values: WireValues) -> tf.DType:
    """The dtype of values in messages."""
    return tf.float16 if values is WireValues.fp16 else tf.float32


def to_wire(values: tf.Tensor, dtype: tf.DType, num_ranks: int = 1) -> tf.Tensor:
    """Converts float32 values to the dtype of messages; for half precision, clips so that sums cannot overflow."""
    largest = largest_half(num_ranks)
    return tf.cast(tf.clip_by_value(values, -largest, largest) if dtype == tf.float16 else values, dtype)


def padded(values: tf.Tensor, size: int) -> tf.Tensor:
    """Pads the last dimension with zeros to a size."""
    return tf.pad(values, [*[[0, 0]] * (len(values.shape) - 1), [0, size - values.shape[-1]]])


def where_positive(scales: tf.Tensor) -> tf.Tensor:
    """Divisors: the scales, or 1 where a scale is 0."""
    return tf.where(scales > 0, scales, 1.0)

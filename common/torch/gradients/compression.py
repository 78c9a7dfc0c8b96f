"""The base classes of gradient compressors in PyTorch: the exchanges, and the wrappers of any method.

A method is the class Compressor in common/torch/gradients/compressors/<method>.py; common/gradients/compression.py has
its reference in numpy.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.config.schema import CompressionConfig, DGCConfig, LossyConfig, SparseConfig, WireValues
from common.distributed.topology import Topology
from common.gradients.bucketing import allreduce_bytes
from common.gradients.compression import CHUNK, GROUP, adasum_weights, compressor_class, largest_half, piece_size
from common.torch.distributed import runtime

import horovod.torch as hvd
import numpy as np
import torch
from torch import Tensor

Exchange = Generator[Any, Tensor, tuple[Tensor, Tensor]]
"""A generator that yields Horovod's handles and is sent their results; returns the sum and this rank's error, (n,)."""


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
        self.num_bytes = self._num_messages = 0

    def allreduce(self, values: Tensor) -> int:
        """Sums values (...), float16, float32 or float64, over the ranks in place."""
        return hvd.allreduce_async_(values, op=hvd.Sum, **self._sent(allreduce_bytes(values.nbytes, self.size)))

    def alltoall(self, rows: Tensor) -> int:
        """Sends row r of (ranks, ...) to rank r; row r of the result comes from rank r."""
        return hvd.alltoall_async(rows, **self._sent(rows.nbytes // self.size * (self.size - 1)))

    def allgather(self, values: Tensor) -> int:
        """Concatenates the values (k, ...) of all ranks."""
        return hvd.allgather_async(values, **self._sent(values.nbytes * (self.size - 1)))

    def broadcast(self, values: Tensor) -> int:
        """Broadcasts the first rank's values in place; counts the bytes that the root of a binary tree sends."""
        num_bytes = values.nbytes * math.ceil(math.log2(self.size)) if self.rank == 0 else 0
        return hvd.broadcast_async_(values, self._process_set.ranks[0], **self._sent(num_bytes))

    def _sent(self, num_bytes: int) -> dict[str, Any]:
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
        device: the device of the gradients.
    """

    number: int
    shapes: Sequence[tuple[int, ...]]
    communicator: Communicator
    seed: int
    device: torch.device

    @property
    def lengths(self) -> list[int]:
        """Number of values of each gradient."""
        return [math.prod(shape) for shape in self.shapes]

    def random(self, step: int, rank: int = 0) -> torch.Generator:
        """The random numbers of a step and rank; with rank=0, the default, they are the same on all ranks."""
        state = np.random.SeedSequence((self.seed, self.number, step, rank)).generate_state(1)[0]
        return torch.Generator(self.device).manual_seed(int(state))

    def new_zeros(self) -> Tensor:
        """Zeros (n,) float32."""
        return torch.zeros(sum(self.lengths), device=self.device)

    def split(self, values: Tensor) -> list[Tensor]:
        """Splits a vector (n,) into tensors with the shapes of the gradients."""
        return [part.view(shape) for part, shape in zip(values.split(self.lengths), self.shapes, strict=True)]


class Compressor(ABC):
    """A method to sum the gradients of a compression group over the ranks.

    Attributes:
        state: the state before an exchange, by its names in a checkpoint: one tensor (n,) for the whole group, or a
            list with one tensor per gradient.
        next_state: the state that the last exchange has computed, by the same names; it shares no memory with `state`.
    """

    def __init__(self, cfg: CompressionConfig, group: CompressionGroup) -> None:
        self.group = group
        self.state: dict[str, Any] = {}
        self.next_state: dict[str, Any] = {}

    @abstractmethod
    def exchange(self, values: Tensor, step: int) -> Exchange:
        """Sums values (n,) over the ranks of group.communicator; may overwrite them. Steps count from 0."""

    @property
    def num_bytes(self) -> int:
        """Bytes that this rank has sent in the last exchange."""
        return self.group.communicator.num_bytes

    def commit(self) -> None:
        """Makes the next state the current one; not called if the step is skipped."""
        for name, new in self.next_state.items():
            # The next exchange reuses the memory of the old state: allocating it takes longer than the computation.
            self.state[name], self.next_state[name] = new, self.state[name]

    def state_by_gradient(self) -> dict[str, list[Tensor]]:
        """The state by name: one tensor per gradient of the group."""
        return {
            name: values if isinstance(values, list) else self.group.split(values)
            for name, values in self.state.items()
        }


class Dense(Compressor):
    """Sums values without compression."""

    def exchange(self, values: Tensor, step: int) -> Exchange:
        """One allreduce of the gradients and of scalars appended to them, whose bytes are not counted."""
        handle = self.group.communicator.allreduce(values)
        self.group.communicator.num_bytes = allreduce_bytes(
            sum(self.group.lengths) * values.element_size(), self.group.communicator.size
        )
        summed = yield handle
        return summed, values.new_zeros(())


class Codec(Compressor):
    """A dense code that is exchanged in two phases."""

    @abstractmethod
    def encode(self, pieces: Tensor, random: torch.Generator) -> Tensor:
        """The codes (K, bytes) uint8 of K pieces (K, P) float32."""

    @abstractmethod
    def decode(self, codes: Tensor, size: int) -> Tensor:
        """The pieces (K, P) float32 of codes (K, bytes), P = size."""

    def exchange(self, values: Tensor, step: int) -> Exchange:
        """See common/gradients/compression.py, two_phases()."""
        communicator = self.group.communicator
        size, me = piece_size(len(values), communicator.size), communicator.rank
        pieces = _padded(values, communicator.size * size).view(communicator.size, size)
        random = self.group.random(step, me + 1)
        codes = self.encode(pieces, random)
        errors = pieces - self.decode(codes, size)
        received = self.decode((yield communicator.alltoall(codes)), size)
        received[me] = pieces[me]
        total = received[0]
        for row in received[1:]:
            total += row
        code = self.encode(total[None], random)
        errors[me] = total - self.decode(code, size)[0]
        summed = self.decode((yield communicator.allgather(code)), size)
        return summed.flatten()[: len(values)], errors.flatten()[: len(values)]


class ScaledCodec(Codec):
    """Integers of a few bits with a float32 scale for each CHUNK of values; see common/gradients/compression.py."""

    bits: int

    @abstractmethod
    def quantize(self, chunks: Tensor, sizes: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Scales (K, C) and integers (K, C, CHUNK) for chunks (K, C, CHUNK), zero beyond their sizes (C,) float64."""

    @abstractmethod
    def dequantize(self, scales: Tensor, integers: Tensor) -> Tensor:
        """Values (K, C, CHUNK) for scales (K, C, 1) and integers (K, C, CHUNK), all float32."""

    def encode(self, pieces: Tensor, random: torch.Generator) -> Tensor:
        """The scales, followed by the packed integers."""
        size = pieces.shape[1]
        starts = torch.arange(0, size, CHUNK, device=pieces.device)
        sizes = (size - starts).clamp(max=CHUNK).double()
        chunks = _padded(pieces, len(starts) * CHUNK).view(len(pieces), len(starts), CHUNK)
        scales, integers = self.quantize(chunks, sizes, random)
        return torch.cat([as_bytes(scales), pack(integers.flatten(1)[:, :size], self.bits)], 1)

    def decode(self, codes: Tensor, size: int) -> Tensor:
        """The float32 values of the scales and integers."""
        num_chunks = math.ceil(size / CHUNK)
        scales, packed = codes.split([4 * num_chunks, codes.shape[1] - 4 * num_chunks], 1)
        integers = _padded(unpack(packed, self.bits), num_chunks * CHUNK).view(len(codes), num_chunks, CHUNK)
        values = self.dequantize(from_bytes(scales, torch.float32)[..., None], integers.float())
        return values.flatten(1)[:, :size]


class Sparse(Compressor):
    """Some of the values, with their indices, by allgather."""

    def __init__(self, cfg: SparseConfig, group: CompressionGroup) -> None:
        super().__init__(cfg, group)
        self.dtype = wire_dtype(cfg.values)

    @abstractmethod
    def choose(self, values: Tensor, step: int) -> Tensor:
        """The indices (k,) int64 of the values (n,) to send; k is the same on all ranks."""

    def exchange(self, values: Tensor, step: int) -> Exchange:
        """Sends int32 indices and values."""
        indices = self.choose(values, step)
        sent = to_wire(values[indices], self.dtype)
        message = torch.cat([indices.to(torch.int32).view(torch.uint8), sent.view(torch.uint8)])
        received = (yield self.group.communicator.allgather(message)).view(self.group.communicator.size, -1)
        summed = torch.zeros_like(values)
        for row in received:
            theirs = from_bytes(row[: 4 * len(indices)], torch.int32)
            added = from_bytes(row[4 * len(indices) :], self.dtype)
            summed.index_add_(0, theirs, added.float())
        values.index_add_(0, indices, -sent.float())
        return summed, values


class Adasum(Compressor):
    """Adaptive summation of the ranks' gradients, in two phases; the dot products of a round are one message."""

    def exchange(self, values: Tensor, step: int) -> Exchange:
        """See common/gradients/compression.py, adasum(); values are the mean gradient of this rank's examples."""
        communicator = self.group.communicator
        size = piece_size(len(values), communicator.size)
        # The gradient that each value belongs to; the padding at the end counts as another gradient.
        lengths = torch.tensor([*self.group.lengths, communicator.size * size - len(values)], device=values.device)
        gradient = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths)
        gradient = gradient.view(communicator.size, size)[communicator.rank]
        rows = yield communicator.alltoall(_padded(values, communicator.size * size).view(communicator.size, size))
        level = list(rows)
        while len(level) > 1:
            pairs = [level[first : first + 2] for first in range(0, len(level) - 1, 2)]
            products = torch.stack([x.double() * y for a, b in pairs for x, y in ((a, b), (a, a), (b, b))])
            sums = products.new_zeros(len(products), len(lengths)).index_add_(1, gradient, products)
            sums = yield communicator.allreduce(sums)
            weights = [
                [adasum_weights(*of_gradient) for of_gradient in of_pair]
                for of_pair in sums.view(len(pairs), 3, -1).transpose(1, 2).tolist()
            ]
            factors = values.new_tensor(weights)[:, gradient]  # (pairs, size, 2)
            combined = [factor[:, 0] * a + factor[:, 1] * b for (a, b), factor in zip(pairs, factors, strict=True)]
            level = combined + level[2 * len(pairs) :]
        summed = yield communicator.allgather(level[0])
        return summed[: len(values)], values.new_zeros(())


class ErrorFeedback(Compressor):
    """Adds the error of the last exchange to the values of the next one."""

    def __init__(self, inner: Compressor) -> None:
        super().__init__(CompressionConfig("error_feedback"), inner.group)
        self._inner = inner
        self.state, self.next_state = inner.state, inner.next_state
        self.state["residual"] = inner.group.new_zeros()

    def exchange(self, values: Tensor, step: int) -> Exchange:
        """Exchanges the corrected values."""
        corrected = torch.add(values, self.state["residual"], out=self.next_state.get("residual"))
        summed, error = yield from self._inner.exchange(corrected, step)
        self.next_state["residual"] = error
        return summed, error


class TwoLevel(Compressor):
    """Sums uncompressed within a host; the first ranks of the hosts exchange the compressed sums."""

    def __init__(self, inner: Compressor, host: Communicator, is_first: bool) -> None:
        super().__init__(CompressionConfig("two_level"), inner.group)
        self._inner, self._host, self._is_first = inner, host, is_first
        self.state, self.next_state = inner.state, inner.next_state

    def exchange(self, values: Tensor, step: int) -> Exchange:
        """Allreduce within the host, the inner exchange between hosts, broadcast within the host."""
        self._host.begin()
        summed, error = (yield self._host.allreduce(values)), values.new_zeros(())
        if self._is_first:
            summed, error = yield from self._inner.exchange(summed, step)
        summed = yield self._host.broadcast(summed)
        return summed, error

    @property
    def num_bytes(self) -> int:
        """Bytes that this rank has sent in the last exchange, within the host and between hosts."""
        return super().num_bytes + self._host.num_bytes


class PlainMomentum:
    """With DGC, the momentum of weights whose gradients are not compressed; it replaces the optimizer's momentum.

    Args:
        momentum: the factor on the velocity.
        parameters: the parameters, by index.

    Attributes:
        velocities: the velocities, by index; the same on all ranks.
    """

    def __init__(self, momentum: float, parameters: Mapping[int, Tensor]) -> None:
        self._momentum, self._parameters = momentum, parameters
        self.velocities = {index: torch.zeros_like(parameter) for index, parameter in parameters.items()}

    def apply(self) -> None:
        """Updates the velocities, and replaces the exchanged gradients with them."""
        for index, parameter in self._parameters.items():
            if parameter.grad is not None:
                self.velocities[index].mul_(self._momentum).add_(parameter.grad)
                parameter.grad.copy_(self.velocities[index])


def build(cfg: LossyConfig, group: CompressionGroup, topology: Topology) -> Compressor:
    """The configured compressor, with error feedback and the two-level exchange around it if configured."""
    compressor: Compressor = compressor_class("torch", cfg.name)(cfg, group)
    if cfg.error_feedback and not isinstance(cfg, DGCConfig):  # DGC has a residual already
        compressor = ErrorFeedback(compressor)
    if cfg.two_level:
        host = Communicator(f"gradients.{group.number}.host", runtime.process_set(topology.ranks_of_host))
        compressor = TwoLevel(compressor, host, topology.local_rank == 0)
    return compressor


class Exchanges:
    """Runs several exchanges at once, so that their messages overlap."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, Exchange, int]] = deque()

    def start(self, number: int, exchange: Exchange) -> None:
        """Sends the first message of an exchange."""
        self._waiting.append((number, exchange, next(exchange)))

    def finish(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Waits for all exchanges; returns their results by number."""
        results = {}
        while self._waiting:
            number, exchange, handle = self._waiting.popleft()
            result = hvd.synchronize(handle)
            received = result[0] if isinstance(result, tuple) else result  # alltoall also returns its splits
            try:
                self._waiting.append((number, exchange, exchange.send(received)))
            except StopIteration as stop:
                results[number] = stop.value
        return results


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # key: size in bytes


def _word_size(bits: int) -> int:
    """Bytes of the smallest integer that can hold a group: 64-bit words would be slower than needed."""
    return next(size for size in _WORDS if size >= bits)


def _place_values(bits: int, device: torch.device) -> Tensor:
    """(GROUP, 1) factors that shift each integer of a group to its bits in a word; overflow wraps as in a shift."""
    return (1 << bits * torch.arange(GROUP, device=device)).to(_WORDS[_word_size(bits)])[:, None]


def pack(integers: Tensor, bits: int) -> Tensor:
    """(K, P) integers below 2 ** bits -> (K, P * bits / 8) uint8; see common/gradients/compression.py."""
    place_values = _place_values(bits, integers.device)
    eighths = integers.reshape(len(integers), GROUP, -1).to(place_values.dtype)
    words = (eighths * place_values).sum(1, dtype=place_values.dtype)
    return as_bytes(words).view(len(words), -1, words.element_size())[..., :bits].flatten(1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The integers that were given to pack(), as uint8."""
    size = _word_size(bits)
    words = from_bytes(_padded(packed.reshape(len(packed), -1, bits), size).flatten(1), _WORDS[size])
    shifts = bits * torch.arange(GROUP, device=packed.device, dtype=words.dtype)[:, None]
    return ((words[:, None] >> shifts).to(torch.uint8) & (2**bits - 1)).flatten(1)


def as_bytes(rows: Tensor) -> Tensor:
    """(K, n) of any dtype -> (K, bytes) uint8, without a copy."""
    return rows.contiguous().view(torch.uint8)


def from_bytes(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., bytes) uint8 -> (..., n) of the dtype."""
    return rows.clone(memory_format=torch.contiguous_format).view(dtype)


def wire_dtype(values: WireValues) -> torch.dtype:
    """The dtype of values in messages."""
    return torch.float16 if values is WireValues.fp16 else torch.float32


def to_wire(values: Tensor, dtype: torch.dtype, num_ranks: int = 1) -> Tensor:
    """Converts float32 values to the dtype of messages; for half precision, clips so that sums cannot overflow."""
    largest = largest_half(num_ranks)
    return (values.clamp(-largest, largest) if dtype is torch.float16 else values).to(dtype)


def _padded(values: Tensor, size: int) -> Tensor:
    """Pads the last dimension with zeros to a size."""
    return torch.nn.functional.pad(values, (0, size - values.shape[-1]))


def where_positive(scales: Tensor) -> Tensor:
    """Divisors: the scales, or 1 where a scale is 0."""
    return torch.where(scales > 0, scales, 1.0)

"""The gradient compressors in numpy: the reference that the PyTorch and TensorFlow versions are tested against.

A compressor takes one flat float32 vector from each of N ranks and returns the same vector to all of them: an
approximation of the sum. The part of a rank's vector that is missing from the sum is that rank's error:

    sum of the errors over the ranks = sum of the vectors - the returned vector

Error feedback adds a rank's error to its next vector, so that nothing is lost, only delayed (Seide et al., "1-Bit
Stochastic Gradient Descent and its Application to Data-Parallel Distributed Training of Speech DNNs", 2014,
https://www.isca-archive.org/interspeech_2014/seide14_interspeech.html; Karimireddy et al., "Error Feedback Fixes
SignSGD and other Gradient Compression Schemes", 2019, https://arxiv.org/abs/1901.09847).

There are three ways to exchange. Dense codes and sums save bytes at any number of ranks; the allgather of k of n values
with indices only for N < n / k.
- Dense codes in two phases: each rank owns a piece of the vector, receives the others' codes of it (alltoall), sums
  them in float32, and sends the code of the sum to all (allgather): 2 (N - 1) / N times the code's size.
- Sparse values with their indices, by allgather: N - 1 times their size.
- Sums of fewer values, by allreduce.
"""

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from common.errors import ConfigError

import numpy as np

RANK_LOCAL_STATE = (
    "residual",
    "velocity",
)  # states that differ between ranks; a checkpoint holds their sum over the ranks
CHUNK = 1024  # values that share one float32 scale
WARM_UP_STAGES = 4  # stages of DGC's sparsity warm-up
GROUP = 8  # values that are packed together: 8 values of b bits take b bytes

Floats = np.ndarray
Bytes = np.ndarray
Uniforms = Callable[[tuple[int, ...]], Floats]  # shape -> float32 in [0, 1)


def piece_size(num_values: int, num_ranks: int) -> int:
    """Number of values that each rank owns in a dense code: a multiple of GROUP; the last piece may need padding."""
    return math.ceil(num_values / num_ranks / GROUP) * GROUP


def num_sent(num_values: int, ratio: float) -> int:
    """Number of values that a sparse compressor sends; at least one."""
    return min(num_values, max(1, math.ceil(num_values * ratio)))


def compressor_class(framework: str, method: str) -> Any:
    """The class Compressor that carries a method out in a framework, torch or tf.

    Raises:
        ConfigError: there is none.
    """
    module = f"common.{framework}.gradients.compressors.{method}"
    if find_spec(module) is None:
        file = f"{module.replace('.', '/')}.py"
        raise ConfigError([f"compression={method}: there is no {file}; write it, or use another"])
    return importlib.import_module(module).Compressor


def is_matrix_for_powersgd(shape: Sequence[int], rank: int) -> bool:
    """Whether PowerSGD sends a weight of this shape as two factors: they must be less than half of the matrix."""
    rows, columns = matrix_shape(shape)
    return min(rows, columns) > rank and 2 * rank * (rows + columns) < rows * columns


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """A weight's shape as a matrix: its first or last axis, the longer of the two, against all other axes."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    if shape[0] >= shape[-1]:
        return shape[0], math.prod(shape[1:])
    return math.prod(shape[:-1]), shape[-1]


class Codec(ABC):
    """A dense code: encodes float32 values as bytes."""

    @abstractmethod
    def encode(self, values: Floats, uniforms: Uniforms) -> Bytes:
        """The uint8 code of float32 values (P,), where P is a multiple of GROUP."""

    @abstractmethod
    def decode(self, content: Bytes, num_values: int) -> Floats:
        """The float32 values (P,) of a code, P = num_values."""


class Float16(Codec):
    """IEEE half precision."""

    def encode(self, values: Floats, uniforms: Uniforms) -> Bytes:
        """Two bytes per value."""
        return to_wire(values, np.float16).view(np.uint8)

    def decode(self, content: Bytes, num_values: int) -> Floats:
        """The half-precision values as float32."""
        return content.view(np.float16).astype(np.float32)


def largest_half(num_ranks: int) -> float:
    """The largest magnitude that a rank may send in half precision without an overflow of the sum over num_ranks.

    Values are clipped to it, and what is cut off is the sender's error. The factor 2 leaves room for the rounding at
    each addition.
    """
    return 65504.0 if num_ranks == 1 else 65504.0 / (2 * num_ranks)


def to_wire(values: Floats, dtype: type) -> np.ndarray:
    """Converts float32 values to the dtype of the message; for half precision, clips them to its largest value."""
    return (values.clip(-largest_half(1), largest_half(1)) if dtype is np.float16 else values).astype(dtype)


class BFloat16(Codec):
    """bfloat16: the upper half of a float32, rounded to even. It is computed from bits, as numpy lacks the type."""

    def encode(self, values: Floats, uniforms: Uniforms) -> Bytes:
        """Two bytes per value."""
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).view(np.uint8)

    def decode(self, content: Bytes, num_values: int) -> Floats:
        """The bfloat16 values as float32."""
        return (content.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


class ScaledCodec(Codec):
    """Integers of a few bits, with one float32 scale for each CHUNK of values; the scales come first.

    Attributes:
        bits: bits of one integer, 1 to 8.
    """

    bits: int

    @abstractmethod
    def quantize(self, chunks: Floats, sizes: Floats, uniforms: Uniforms) -> tuple[Floats, np.ndarray]:
        """Scales (C,) and integers (C, CHUNK) for chunks (C, CHUNK), which have zeros beyond their sizes (C,)."""

    @abstractmethod
    def dequantize(self, scales: Floats, integers: Floats) -> Floats:
        """The float32 values (C, CHUNK) for scales (C, 1) and integers (C, CHUNK)."""

    def encode(self, values: Floats, uniforms: Uniforms) -> Bytes:
        """The scales, followed by the packed integers."""
        num_chunks = math.ceil(len(values) / CHUNK)
        chunks = np.pad(values, (0, num_chunks * CHUNK - len(values))).reshape(num_chunks, CHUNK)
        scales, integers = self.quantize(chunks, chunk_sizes(len(values)), uniforms)
        return np.concatenate([scales.view(np.uint8), pack(integers.reshape(-1)[: len(values)], self.bits)])

    def decode(self, content: Bytes, num_values: int) -> Floats:
        """The float32 values (num_values,) of the scales and integers."""
        num_chunks = math.ceil(num_values / CHUNK)
        scales, packed = np.split(content, [4 * num_chunks])
        integers = np.pad(unpack(packed, self.bits), (0, num_chunks * CHUNK - num_values)).reshape(num_chunks, CHUNK)
        values = self.dequantize(scales.view(np.float32)[:, None], integers.astype(np.float32))
        return values.reshape(-1)[:num_values]


def chunk_sizes(num_values: int) -> np.ndarray:
    """(C,) float64: the number of values in each chunk, CHUNK except for the last one."""
    starts = np.arange(0, num_values, CHUNK)
    return np.minimum(CHUNK, num_values - starts).astype(np.float64)


def pack(integers: np.ndarray, bits: int) -> Bytes:
    """(P,) integers below 2 ** bits -> (P * bits / 8,) uint8.

    Eight values, one from each eighth of the vector, are packed into the low bytes of one 64-bit word.
    """
    words = (integers.reshape(GROUP, -1).astype(np.int64) << (bits * np.arange(GROUP))[:, None]).sum(0)
    packed: Bytes = words.astype("<i8")[:, None].view(np.uint8)[:, :bits].reshape(-1)
    return packed


def unpack(packed: Bytes, bits: int) -> np.ndarray:
    """The integers that pack() was given."""
    words = np.zeros((len(packed) // bits, GROUP), np.uint8)
    words[:, :bits] = packed.reshape(-1, bits)
    integers: np.ndarray = words.view("<i8")[:, 0] >> (bits * np.arange(GROUP))[:, None] & (2**bits - 1)
    return integers.reshape(-1)


class Int8(ScaledCodec):
    """Rounds to the nearest of 255 evenly spaced steps between plus and minus the chunk's largest magnitude.

    Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", 2016, https://arxiv.org/abs/1511.04561, here with
    evenly spaced steps.
    """

    bits = 8

    def quantize(self, chunks: Floats, sizes: Floats, uniforms: Uniforms) -> tuple[Floats, np.ndarray]:
        """The scale is one step."""
        # Multiply by a constant: TensorFlow rewrites the division as this product, which rounds differently.
        scales = np.abs(chunks).max(1) * np.float32(1 / 127)
        return scales, np.rint(chunks / where_positive(scales)).astype(np.int64) + 127

    def dequantize(self, scales: Floats, integers: Floats) -> Floats:
        """The number of steps times the scale."""
        values: Floats = (integers - np.float32(127)) * scales
        return values


class QSGD(ScaledCodec):
    """Stochastic rounding to 2 s + 1 evenly spaced steps, s = 2 ** (bits - 1) - 1; unbiased.

    Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding", 2017,
    https://arxiv.org/abs/1610.02132 (section 3.1, with the largest magnitude as the scale, as in section 5).
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.steps = np.float32(2 ** (bits - 1) - 1)

    def quantize(self, chunks: Floats, sizes: Floats, uniforms: Uniforms) -> tuple[Floats, np.ndarray]:
        """The scale is the largest magnitude."""
        scales = np.abs(chunks).max(1)
        exact = chunks / where_positive(scales) * self.steps
        return scales, np.floor(exact + uniforms(chunks.shape)).clip(-self.steps, self.steps) + self.steps

    def dequantize(self, scales: Floats, integers: Floats) -> Floats:
        """The number of steps times scale / s."""
        return (integers - self.steps) * (scales / self.steps)


class TernGrad(QSGD):
    """Stochastic rounding to -1, 0 or 1 times the chunk's largest magnitude; unbiased without clipping.

    Wen et al., "TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep Learning", 2017,
    https://arxiv.org/abs/1705.07878 (section 3.2; clipping: section 3.3).

    Args:
        clip: clips values to `clip` standard deviations of the chunk (about zero). This makes the steps smaller and
            biases the clipped values. 0: no clipping.
    """

    def __init__(self, clip: float) -> None:
        super().__init__(bits=2)
        self.clip = clip

    def quantize(self, chunks: Floats, sizes: Floats, uniforms: Uniforms) -> tuple[Floats, np.ndarray]:
        """The scale is the largest magnitude after clipping."""
        if self.clip:
            squares = (chunks.astype(np.float64) ** 2).sum(1) / sizes
            bounds = (self.clip * np.sqrt(squares)).astype(np.float32)[:, None]
            chunks = chunks.clip(-bounds, bounds)
        return super().quantize(chunks, sizes, uniforms)


class Sign(ScaledCodec):
    """Plus or minus the chunk's mean magnitude: one bit per value.

    Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", 2019,
    https://arxiv.org/abs/1901.09847 (algorithm 1). Error feedback in both phases: Tang et al., "1-bit Adam", 2021,
    https://arxiv.org/abs/2102.02888 (section 4.2).
    """

    bits = 1

    def quantize(self, chunks: Floats, sizes: Floats, uniforms: Uniforms) -> tuple[Floats, np.ndarray]:
        """The scale is the mean magnitude."""
        scales = (np.abs(chunks).sum(1, dtype=np.float64) / sizes).astype(np.float32)
        return scales, chunks >= 0

    def dequantize(self, scales: Floats, integers: Floats) -> Floats:
        """Plus or minus the scale."""
        values: Floats = (2 * integers - 1) * scales
        return values


def where_positive(scales: Floats) -> Floats:
    """Divisors (C, 1): the scales (C,), or 1 where a scale is 0."""
    return np.where(scales > 0, scales, np.float32(1))[:, None]


def two_phases(vectors: Sequence[Floats], codec: Codec, uniforms: Uniforms) -> tuple[Floats, list[Floats]]:
    """The sum by a dense code, and each rank's error. An owner adds its part of its piece without encoding it."""
    num_values, num_ranks = len(vectors[0]), len(vectors)
    size = piece_size(num_values, num_ranks)
    pieces = [np.pad(vector, (0, num_ranks * size - num_values)).reshape(num_ranks, size) for vector in vectors]
    arrived = [
        [codec.decode(codec.encode(piece, uniforms), size) for piece in of_rank] for of_rank in pieces
    ]  # arrived[rank][owner]
    summed, errors = [], [piece - np.stack(values) for piece, values in zip(pieces, arrived, strict=True)]
    for owner in range(num_ranks):
        arrived[owner][owner] = pieces[owner][owner]
        total = arrived[0][owner]
        for rank in range(1, num_ranks):
            total = total + arrived[rank][owner]
        summed.append(codec.decode(codec.encode(total, uniforms), size))
        errors[owner][owner] = total - summed[-1]
    return np.concatenate(summed)[:num_values], [error.reshape(-1)[:num_values] for error in errors]


def top_k(vectors: Sequence[Floats], ratio: float, dtype: type = np.float32) -> tuple[Floats, list[Floats]]:
    """The sum of each rank's values of largest magnitude, and each rank's error.

    Aji and Heafield, "Sparse Communication for Distributed Gradient Descent", 2017, https://arxiv.org/abs/1704.05021
    """
    summed, errors = np.zeros_like(vectors[0]), []
    for vector in vectors:
        chosen = np.argsort(-np.abs(vector), kind="stable")[: num_sent(len(vector), ratio)]
        sent = np.zeros_like(vector)
        sent[chosen] = to_wire(vector[chosen], dtype)
        summed += sent
        errors.append(vector - sent)
    return summed, errors


def random_parts(num_values: int, num_sent: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and widths (k,) int64 of k nearly equal parts of a vector, k = num_sent; one value is drawn from each.

    Each value is drawn with probability k / n, none is drawn twice, and memory is read in order.
    """
    edges = np.arange(num_sent + 1) * num_values // num_sent
    return edges[:-1], np.diff(edges)


def random_k(vectors: Sequence[Floats], uniforms: Floats, unbiased: bool) -> tuple[Floats, list[Floats]]:
    """The sum at random indices, which are the same on all ranks, and each rank's error.

    Stich, Cordonnier and Jaggi, "Sparsified SGD with Memory", 2018, https://arxiv.org/abs/1809.07599. Unbiased: scaled
    by n / k, for use without error feedback (Konecny et al., 2016, https://arxiv.org/abs/1610.05492).

    Args:
        vectors: the vector (n,) of each rank.
        uniforms: (k,) in [0, 1), the same on all ranks.
        unbiased: whether to scale by n / k.
    """
    starts, widths = random_parts(len(vectors[0]), len(uniforms))
    indices = starts + np.minimum((uniforms * widths).astype(np.int64), widths - 1)
    factor = np.float32(len(vectors[0]) / len(indices)) if unbiased else np.float32(1)
    summed, errors = np.zeros_like(vectors[0]), []
    for vector in vectors:
        summed[indices] += vector[indices] * factor
        error = vector.copy()
        error[indices] -= vector[indices] * factor
        errors.append(error)
    return summed, errors


def local_clip_norm(max_norm: float, num_ranks: int) -> float:
    """The norm to which each rank clips its part of the mean gradient before compression.

    With error feedback, clipping after the exchange would drop gradient that no residual has recorded. The sum of
    independent parts then has a norm of about max_norm. Source: Lin et al., 2018 (section 3.2; see below).
    """
    return max_norm / math.sqrt(num_ranks)


def deep_gradient_compression(
    gradients: Sequence[Floats], state: list[dict[str, Floats]], ratio: float, momentum: float
) -> Floats:
    """One step of DGC; updates each rank's velocity and residual in `state`, whose entries are empty at first.

    Lin et al., "Deep Gradient Compression: Reducing the Communication Bandwidth for Distributed Training", 2018,
    https://arxiv.org/abs/1712.01887 (algorithm 4: momentum correction and momentum factor masking)
    """
    summed = np.zeros_like(gradients[0])
    for gradient, of_rank in zip(gradients, state, strict=True):
        velocity = np.float32(momentum) * of_rank.get("velocity", np.zeros_like(summed)) + gradient
        residual = of_rank.get("residual", np.zeros_like(summed)) + velocity
        sent, errors = top_k([residual], ratio)
        summed += sent
        of_rank |= {"velocity": np.where(sent != 0, np.float32(0), velocity), "residual": errors[0]}
    return summed


def sparsity_warm_up(step: int, warmup_steps: int, ratio: float) -> float:
    """The fraction of values that DGC sends: 1/4 at first, then smaller by the same factor in each of four stages.

    Args:
        step: number of the step, counted from 0 at the first compressed one.
        warmup_steps: number of steps until the fraction is `ratio`; the paper has four epochs, and 25 % to 0.4 %.
        ratio: the final fraction.
    """
    if step >= warmup_steps or ratio >= 0.25:
        return ratio
    stage = WARM_UP_STAGES * step // warmup_steps
    return float(0.25 * (ratio / 0.25) ** (stage / WARM_UP_STAGES))


def power_sgd(
    matrices: Sequence[Floats], factor: Floats, dtype: type = np.float32
) -> tuple[Floats, list[Floats], Floats]:
    """A low-rank approximation of the sum of the ranks' matrices (m, n), by one power iteration from factor (n, rank).

    Vogels, Karimireddy and Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization",
    2019, https://arxiv.org/abs/1905.13727 (algorithm 1)

    In half precision, products of small gradients with small factors would underflow. So the factor's columns are
    scaled to length 1, which leaves the basis unchanged, and the messages are divided by the root of the sum of all
    ranks' squares, which is summed beforehand: no value in a message is then larger than 1.

    Returns:
        The approximate sum (m, n), each rank's error, and the factor that the next step starts from.
    """
    scale = np.float32(1)
    if dtype is np.float16:
        scale = np.float32(math.sqrt(sum((matrix.astype(np.float64) ** 2).sum() for matrix in matrices)) or 1.0)
        factor = factor / where_positive(np.linalg.norm(factor, axis=0)).T

    def summed_over_ranks(products: Sequence[Floats]) -> Floats:
        total: Floats = np.sum([(product / scale).astype(dtype) for product in products], axis=0, dtype=dtype)
        return total.astype(np.float32)

    basis, _ = np.linalg.qr(summed_over_ranks([matrix @ factor for matrix in matrices]))
    factor = scale * summed_over_ranks([matrix.T @ basis for matrix in matrices])
    summed = basis @ factor.T
    return summed, [matrix - summed / len(matrices) for matrix in matrices], factor


def adasum(gradients: Sequence[Sequence[Floats]]) -> list[Floats]:
    """Combines the gradients of any number of ranks, a list of layers each, in pairs until one gradient is left.

    Two parallel gradients are averaged, orthogonal ones are added. Maleki et al., "Scaling Distributed Training with
    Adaptive Summation", 2021, https://arxiv.org/abs/2006.02924 (section 3). The pairs form a binary tree; the last of
    an odd number of ranks waits for the next round.
    """
    level = [list(of_rank) for of_rank in gradients]
    while len(level) > 1:
        pairs = [
            [_combined(a, b) for a, b in zip(*level[first : first + 2], strict=True)]
            for first in range(0, len(level) - 1, 2)
        ]
        level = pairs + level[len(pairs) * 2 :]
    return level[0]


def _combined(a: Floats, b: Floats) -> Floats:
    dot, a_squares, b_squares = (float((x.astype(np.float64) * y).sum()) for x, y in ((a, b), (a, a), (b, b)))
    first, second = adasum_weights(dot, a_squares, b_squares)
    return first * a + second * b


def adasum_weights(dot: float, a_squares: float, b_squares: float) -> tuple[float, float]:
    """The weights of two gradients in their adaptive sum; a gradient of zeros leaves the other one unchanged."""
    first = 1 - dot / (2 * a_squares) if a_squares else 1.0
    second = 1 - dot / (2 * b_squares) if b_squares else 1.0
    return first, second

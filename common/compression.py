"""What each gradient compressor does, in numpy: the rule that both bindings follow and are tested against.

A compressor takes one flat float32 vector of each of N ranks and gives all of them the same vector, an approximation of
the sum. What a rank's vector had and the sum lacks is that rank's error:

    sum of the errors over the ranks = sum of the vectors - the vector that all get

Error feedback adds a rank's error to its next vector, so that nothing is lost, only late (Seide et al., "1-Bit
Stochastic Gradient Descent and its Application to Data-Parallel Distributed Training of Speech DNNs", 2014,
https://www.isca-archive.org/interspeech_2014/seide14_interspeech.html; Karimireddy et al., "Error Feedback Fixes
SignSGD and other Gradient Compression Schemes", 2019, https://arxiv.org/abs/1901.09847).

Three ways of travelling, all of which save at any number of ranks or say where they stop to:
- dense codes in two phases: each rank owns a piece of the vector, gets the others' codes of it (alltoall), adds them up
  in float32, and sends the code of the sum to all (allgather): 2 (N - 1) / N times the code's size;
- sparse values with their places by allgather: N - 1 times their size;
- sums of fewer values by allreduce.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

SUMMED = ("residual", "velocity")  # states that each rank has its own of; a checkpoint holds their sum over the ranks
CHUNK = 1024  # values that share one float32 scale
WARM_UP_STAGES = 4  # of DGC
GROUP = 8  # values that are packed together: of b bits each, they take b bytes

Floats = np.ndarray
Bytes = np.ndarray
Uniforms = Callable[[tuple[int, ...]], Floats]  # shape -> float32 in [0, 1)


def piece_size(num_values: int, num_ranks: int) -> int:
    """Values that each rank owns of a dense code: equal pieces of whole groups; the last may go beyond the end."""
    return math.ceil(num_values / num_ranks / GROUP) * GROUP


def num_chosen(num_values: int, ratio: float) -> int:
    """Values that a sparse compressor sends; at least one."""
    return min(num_values, max(1, math.ceil(num_values * ratio)))


def is_matrix_for_powersgd(shape: Sequence[int], rank: int) -> bool:
    """Whether a weight of this shape, as a matrix, is sent as two factors: they must be less than half of it."""
    rows, columns = matrix_shape(shape)
    return min(rows, columns) > rank and 2 * rank * (rows + columns) < rows * columns


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """A weight's shape as a matrix: the longer of its first and its last side, against all others."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    if shape[0] >= shape[-1]:
        return shape[0], math.prod(shape[1:])
    return math.prod(shape[:-1]), shape[-1]


class Codec(ABC):
    """A dense code: bytes for float32 values."""

    @abstractmethod
    def encode(self, values: Floats, uniforms: Uniforms) -> Bytes:
        """The code of values (P,), P a multiple of GROUP, as uint8."""

    @abstractmethod
    def decode(self, content: Bytes, num_values: int) -> Floats:
        """The values (P,) that a code stands for."""


class Float16(Codec):
    """IEEE half precision."""

    def encode(self, values: Floats, uniforms: Uniforms) -> Bytes:
        """Two bytes a value."""
        return to_wire(values, np.float16).view(np.uint8)

    def decode(self, content: Bytes, num_values: int) -> Floats:
        """Exact."""
        return content.view(np.float16).astype(np.float32)


def largest_half(num_ranks: int) -> float:
    """Up to where values are sent in half precision, so that neither they nor the sum of so many overflow.

    What is beyond is the sender's error. Sums round at each addition, which takes a part of the room for them.
    """
    return 65504.0 if num_ranks == 1 else 65504.0 / (2 * num_ranks)


def to_wire(values: Floats, dtype: type) -> np.ndarray:
    """Float32 values in the dtype in which they travel; in half precision they end at its largest value."""
    return (values.clip(-largest_half(1), largest_half(1)) if dtype is np.float16 else values).astype(dtype)


class BFloat16(Codec):
    """The upper half of a float32, rounded to even; numpy has no such type."""

    def encode(self, values: Floats, uniforms: Uniforms) -> Bytes:
        """Two bytes a value."""
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).view(np.uint8)

    def decode(self, content: Bytes, num_values: int) -> Floats:
        """Exact."""
        return (content.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


class ScaledCodec(Codec):
    """Integers of a few bits, with a float32 scale for each CHUNK of values; the scales come first.

    Attributes:
        bits: of an integer, 1 to 8.
    """

    bits: int

    @abstractmethod
    def quantize(self, chunks: Floats, sizes: Floats, uniforms: Uniforms) -> tuple[Floats, np.ndarray]:
        """Scales (C,) and integers (C, CHUNK) of chunks (C, CHUNK), padded by zeros beyond their sizes (C,)."""

    @abstractmethod
    def dequantize(self, scales: Floats, integers: Floats) -> Floats:
        """The values (C, CHUNK) for scales (C, 1) and integers (C, CHUNK), as float32."""

    def encode(self, values: Floats, uniforms: Uniforms) -> Bytes:
        """Scales, then packed integers."""
        num_chunks = math.ceil(len(values) / CHUNK)
        chunks = np.pad(values, (0, num_chunks * CHUNK - len(values))).reshape(num_chunks, CHUNK)
        scales, integers = self.quantize(chunks, chunk_sizes(len(values)), uniforms)
        return np.concatenate([scales.view(np.uint8), pack(integers.reshape(-1)[: len(values)], self.bits)])

    def decode(self, content: Bytes, num_values: int) -> Floats:
        """The values that the scales and integers stand for."""
        num_chunks = math.ceil(num_values / CHUNK)
        scales, packed = np.split(content, [4 * num_chunks])
        integers = np.pad(unpack(packed, self.bits), (0, num_chunks * CHUNK - num_values)).reshape(num_chunks, CHUNK)
        values = self.dequantize(scales.view(np.float32)[:, None], integers.astype(np.float32))
        return values.reshape(-1)[:num_values]


def chunk_sizes(num_values: int) -> np.ndarray:
    """(C,) float64 number of values in each chunk: CHUNK, the last one what is left."""
    starts = np.arange(0, num_values, CHUNK)
    return np.minimum(CHUNK, num_values - starts).astype(np.float64)


def pack(integers: np.ndarray, bits: int) -> Bytes:
    """(P,) integers below 2 ** bits -> (P * bits / 8,) uint8.

    Eight values, one from each eighth of the vector, are put into the low bytes of one 64-bit word.
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
    """Rounded to the nearest of 255 even steps between plus and minus the chunk's largest magnitude.

    Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", 2016, https://arxiv.org/abs/1511.04561, with
    even steps.
    """

    bits = 8

    def quantize(self, chunks: Floats, sizes: Floats, uniforms: Uniforms) -> tuple[Floats, np.ndarray]:
        """The scale is one step."""
        # Times a constant, not divided by one: TensorFlow would make the one of the other, and round otherwise.
        scales = np.abs(chunks).max(1) * np.float32(1 / 127)
        return scales, np.rint(chunks / where_positive(scales)).astype(np.int64) + 127

    def dequantize(self, scales: Floats, integers: Floats) -> Floats:
        """Steps times the scale."""
        values: Floats = (integers - np.float32(127)) * scales
        return values


class QSGD(ScaledCodec):
    """Rounded up or down at random to one of 2 s + 1 even steps, s = 2 ** (bits - 1) - 1, so that the mean is right.

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
        """Steps times the scale over the number of steps."""
        return (integers - self.steps) * (scales / self.steps)


class TernGrad(QSGD):
    """-1, 0 or 1 times the chunk's largest magnitude, at random so that the mean is right.

    Wen et al., "TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep Learning", 2017,
    https://arxiv.org/abs/1705.07878 (section 3.2; clipping: section 3.3).

    Args:
        clip: values beyond so many standard deviations of the chunk are cut off there, which makes the steps smaller
            and the mean of what is cut off wrong; 0: none.
    """

    def __init__(self, clip: float) -> None:
        super().__init__(bits=2)
        self.clip = clip

    def quantize(self, chunks: Floats, sizes: Floats, uniforms: Uniforms) -> tuple[Floats, np.ndarray]:
        """The scale is the largest magnitude that is left."""
        if self.clip:
            squares = (chunks.astype(np.float64) ** 2).sum(1) / sizes
            bounds = (self.clip * np.sqrt(squares)).astype(np.float32)[:, None]
            chunks = chunks.clip(-bounds, bounds)
        return super().quantize(chunks, sizes, uniforms)


class Sign(ScaledCodec):
    """Plus or minus the chunk's mean magnitude: one bit a value.

    Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", 2019,
    https://arxiv.org/abs/1901.09847 (algorithm 1); both phases with error feedback: Tang et al., "1-bit Adam", 2021,
    https://arxiv.org/abs/2102.02888 (section 4.2).
    """

    bits = 1

    def quantize(self, chunks: Floats, sizes: Floats, uniforms: Uniforms) -> tuple[Floats, np.ndarray]:
        """The scale is the mean magnitude."""
        scales = (np.abs(chunks).sum(1, dtype=np.float64) / sizes).astype(np.float32)
        return scales, chunks >= 0

    def dequantize(self, scales: Floats, integers: Floats) -> Floats:
        """The scale with its sign."""
        values: Floats = (2 * integers - 1) * scales
        return values


def where_positive(scales: Floats) -> Floats:
    """(C, 1) the scales (C,) to divide by: 1 where all values are 0."""
    return np.where(scales > 0, scales, np.float32(1))[:, None]


def two_phases(vectors: Sequence[Floats], codec: Codec, uniforms: Uniforms) -> tuple[Floats, list[Floats]]:
    """The sum by a dense code, and each rank's error. What a rank keeps of its own piece is exact until the sum."""
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
        chosen = np.argsort(-np.abs(vector), kind="stable")[: num_chosen(len(vector), ratio)]
        sent = np.zeros_like(vector)
        sent[chosen] = to_wire(vector[chosen], dtype)
        summed += sent
        errors.append(vector - sent)
    return summed, errors


def random_parts(num_values: int, num_chosen: int) -> tuple[np.ndarray, np.ndarray]:
    """(k,) int64 starts and widths of k parts of a vector, as equal as can be; one value is drawn from each.

    So each value has the chance k / n, none is drawn twice, and memory is read in order.
    """
    edges = np.arange(num_chosen + 1) * num_values // num_chosen
    return edges[:-1], np.diff(edges)


def random_k(vectors: Sequence[Floats], uniforms: Floats, unbiased: bool) -> tuple[Floats, list[Floats]]:
    """The sum at random places that all ranks draw alike, and each rank's error.

    Stich, Cordonnier and Jaggi, "Sparsified SGD with Memory", 2018, https://arxiv.org/abs/1809.07599; unbiased: scaled
    by n / k, for use without error feedback (Konecny et al., 2016, https://arxiv.org/abs/1610.05492).

    Args:
        vectors: of the ranks.
        uniforms: (k,) in [0, 1), the same on all ranks.
        unbiased: whether the mean is to be right.
    """
    starts, widths = random_parts(len(vectors[0]), len(uniforms))
    places = starts + np.minimum((uniforms * widths).astype(np.int64), widths - 1)
    factor = np.float32(len(vectors[0]) / len(places)) if unbiased else np.float32(1)
    summed, errors = np.zeros_like(vectors[0]), []
    for vector in vectors:
        summed[places] += vector[places] * factor
        error = vector.copy()
        error[places] -= vector[places] * factor
        errors.append(error)
    return summed, errors


def local_clip_norm(max_norm: float, num_ranks: int) -> float:
    """What each rank clips its part of the mean gradient to before it is compressed.

    What is clipped after an exchange with error feedback would be lost, and the residuals would not know. Parts that
    are as good as independent add up to max_norm. Source: Lin et al., 2018 (section 3.2; see below)
    """
    return max_norm / math.sqrt(num_ranks)


def deep_gradient_compression(
    gradients: Sequence[Floats], state: list[dict[str, Floats]], ratio: float, momentum: float
) -> Floats:
    """One step of DGC; changes each rank's velocity and residual in state, empty at first.

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
    """DGC's share of values that are sent: 1/4 at first, then less by the same factor in each of four stages.

    Args:
        step: from 0, the first one that is compressed.
        warmup_steps: after which it is ratio; the paper has four epochs, and 25 % to 0.4 %.
        ratio: the share in the end.
    """
    if step >= warmup_steps or ratio >= 0.25:
        return ratio
    stage = WARM_UP_STAGES * step // warmup_steps
    return float(0.25 * (ratio / 0.25) ** (stage / WARM_UP_STAGES))


def power_sgd(
    matrices: Sequence[Floats], factor: Floats, dtype: type = np.float32
) -> tuple[Floats, list[Floats], Floats]:
    """The sum of each rank's matrix (m, n) by one step of power iteration from a factor (n, rank).

    Vogels, Karimireddy and Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization",
    2019, https://arxiv.org/abs/1905.13727 (algorithm 1)

    In half precision products of small gradients with small factors would vanish. So the factor's columns are scaled to
    length 1, which leaves the basis as it is, and what is sent is divided by the root of the sum of all ranks' squares,
    a number that is summed before: no value that is sent is then larger than 1.

    Returns:
        The sum of the given rank, each rank's error, and the factor to start the next step from.
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
    """Ranks' gradients, a list of layers each, combined pair by pair until one is left; any number of ranks.

    Two gradients that point the same way are averaged, orthogonal ones added up. Maleki et al., "Scaling Distributed
    Training with Adaptive Summation", 2021, https://arxiv.org/abs/2006.02924 (section 3; the pairs form a binary tree,
    where the last rank of an odd number waits for the next round)
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
    """The weights of two gradients in their adaptive sum; a gradient of zeros leaves the other as it is."""
    first = 1 - dot / (2 * a_squares) if a_squares else 1.0
    second = 1 - dot / (2 * b_squares) if b_squares else 1.0
    return first, second

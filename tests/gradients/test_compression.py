"""Gradient compressors of both bindings against numpy, on real ranks."""

import hashlib
import importlib
import math
import re
from types import ModuleType
from typing import Any

from common.config.schema import ReduceOp, Scope, WireValues
from common.gradients import compression as rules
from common.gradients.loss_scale import LossScale
from tests.helpers.compressors import method

import numpy as np
import pytest

METHODS = ("fp16", "bf16", "int8", "qsgd", "terngrad", "sign", "topk", "randomk", "dgc", "powersgd")
CODECS = {"fp16": rules.Float16(), "bf16": rules.BFloat16(), "int8": rules.Int8(), "sign": rules.Sign()}
SIZE = 5003  # neither chunks nor pieces of it are whole
SHAPES = [(60, 50), (50,), (50, 40), (3, 3, 20, 30)]

at_2_3_4 = pytest.mark.ranks(2, 3, 4)
at_2_3 = pytest.mark.ranks(2, 3)
at_2 = pytest.mark.ranks(2)
at_1_2 = pytest.mark.ranks(1, 2)
at_1_2_4 = pytest.mark.ranks(1, 2, 4)


@pytest.fixture
def binding(framework: str) -> ModuleType:
    return importlib.import_module(f"tests.helpers.exchange_{framework}")


def vectors(num_ranks: int, step: int = 0, size: int = SIZE) -> list[np.ndarray]:
    """Every rank's gradient, of all magnitudes, with zeros."""
    random = np.random.default_rng((num_ranks, step))
    values = random.standard_normal((num_ranks, size)) * 10.0 ** random.uniform(-6, 2, size)
    values[:, ::97] = 0
    return list(values.astype(np.float32))


def coarse_vectors(num_ranks: int, step: int = 0) -> list[np.ndarray]:
    """Distinct multiples of 1/64, whose sums are exact in any order."""
    random = np.random.default_rng((num_ranks, step))
    signs = random.choice([-1, 1], (num_ranks, SIZE))
    return [(random.permutation(SIZE) * sign / 64).astype(np.float32) for sign in signs]


@at_2_3_4
@pytest.mark.parametrize("name", CODECS)
def test_dense_codes_are_those_of_numpy_bit_by_bit(
    binding: ModuleType, runtime: ModuleType, num_ranks: int, name: str
) -> None:
    topology = runtime.init()
    exchange = binding.Exchange([(SIZE,)], topology, compression=method(name, error_feedback=True))
    residuals = [np.zeros(SIZE, np.float32)] * num_ranks
    for step in range(3):
        of_ranks = vectors(num_ranks, step)
        corrected = [vector + residual for vector, residual in zip(of_ranks, residuals, strict=True)]
        summed, residuals = rules.two_phases(corrected, CODECS[name], np.zeros)
        _, (received,) = exchange.step([of_ranks[topology.rank]])
        np.testing.assert_array_equal(received, summed)
        np.testing.assert_array_equal(exchange.state()["residual"][0], residuals[topology.rank])


@at_2_3_4
@pytest.mark.parametrize("values", WireValues)
def test_top_k_is_that_of_numpy_bit_by_bit(
    binding: ModuleType, runtime: ModuleType, num_ranks: int, values: WireValues
) -> None:
    topology = runtime.init()
    exchange = binding.Exchange([(SIZE,)], topology, compression=method("topk", values=values))
    residuals = [np.zeros(SIZE, np.float32)] * num_ranks
    dtype = np.float16 if values is WireValues.fp16 else np.float32
    for step in range(3):
        of_ranks = vectors(num_ranks, step)
        corrected = [vector + residual for vector, residual in zip(of_ranks, residuals, strict=True)]
        summed, residuals = rules.top_k(corrected, 0.01, dtype)
        _, (received,) = exchange.step([of_ranks[topology.rank]])
        np.testing.assert_array_equal(received, summed)
        np.testing.assert_array_equal(exchange.state()["residual"][0], residuals[topology.rank])


@at_2_3_4
def test_dgc_is_that_of_numpy(binding: ModuleType, runtime: ModuleType, num_ranks: int) -> None:
    topology = runtime.init()
    cfg = method("dgc", ratio=0.01, warmup_steps=4, momentum=0.9, start_step=3)
    exchange = binding.Exchange([(SIZE,)], topology, compression=cfg)
    state: list[dict[str, np.ndarray]] = [{} for _ in range(num_ranks)]
    for _ in range(2):  # uncompressed; its warm-up begins after them
        exchange.step([np.zeros(SIZE, np.float32)])
    for step in range(6):
        of_ranks = coarse_vectors(num_ranks, step)
        ratio = rules.sparsity_warm_up(step, 4, 0.01)
        summed = rules.deep_gradient_compression(of_ranks, state, ratio, 0.9)
        _, (received,) = exchange.step([of_ranks[topology.rank]])
        np.testing.assert_allclose(received, summed, rtol=1e-5, atol=1e-8)
        for name, value in state[topology.rank].items():
            np.testing.assert_allclose(exchange.state()[name][0], value, rtol=1e-5, atol=1e-8)


@at_2_3_4
@pytest.mark.parametrize("error_feedback", [True, False])
def test_random_k_sums_the_same_places_of_all_ranks(
    binding: ModuleType, runtime: ModuleType, num_ranks: int, error_feedback: bool
) -> None:
    topology = runtime.init()
    exchange = binding.Exchange([(SIZE,)], topology, compression=method("randomk", error_feedback=error_feedback))
    of_ranks = coarse_vectors(num_ranks)
    _, (received,) = exchange.step([of_ranks[topology.rank]])
    places = np.flatnonzero(received)
    starts, _ = rules.random_parts(SIZE, rules.num_sent(SIZE, 0.01))
    assert np.isin(np.searchsorted(starts, places, "right") - 1, np.arange(len(starts))).all()
    factor = np.float32(1 if error_feedback else SIZE / len(starts))
    rtol = 0 if error_feedback else 1e-4  # sums of coarse values are exact, of scaled ones they are not
    np.testing.assert_allclose(received[places], factor * np.sum(of_ranks, axis=0)[places], rtol=rtol)
    if error_feedback:
        expected = of_ranks[topology.rank].copy()
        expected[places] = 0
        np.testing.assert_array_equal(exchange.state()["residual"][0][expected != 0], expected[expected != 0])
    _, (another,) = exchange.step([of_ranks[topology.rank]])
    assert not np.array_equal(np.flatnonzero(another), places)  # others in the next step


@at_2
def test_with_error_feedback_each_rank_clips_before(binding: ModuleType, runtime: ModuleType, num_ranks: int) -> None:
    topology = runtime.init()
    exchange = binding.Exchange([(SIZE,)], topology, compression=method("topk"), clip_norm=0.5)
    of_ranks = vectors(num_ranks)
    clipped = [vector * np.float32(0.5 / math.sqrt(num_ranks) / np.linalg.norm(vector)) for vector in of_ranks]
    summed, errors = rules.top_k(clipped, 0.01)
    _, (received,) = exchange.step([of_ranks[topology.rank]])
    np.testing.assert_allclose(received, summed, rtol=1e-5)
    np.testing.assert_allclose(exchange.state()["residual"][0], errors[topology.rank], rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(exchange.clipped(1e-6), received)  # and not again


@at_1_2
def test_dgc_keeps_the_momentum_of_weights_that_it_does_not_compress(
    binding: ModuleType, runtime: ModuleType, num_ranks: int
) -> None:
    topology = runtime.init()
    cfg = method("dgc", min_numel=2500, momentum=0.9, warmup_steps=0)
    exchange = binding.Exchange(SHAPES, topology, compression=cfg)
    velocity = np.zeros(50)
    for step in range(4):
        of_ranks = [np.full(50, (rank + 1.5) * step, np.float32) for rank in range(num_ranks)]
        mine = [np.ones(shape, np.float32) for shape in SHAPES]
        mine[1] = of_ranks[topology.rank]
        velocity = 0.9 * velocity + np.sum(of_ranks, axis=0)
        _, received = exchange.step(mine)
        np.testing.assert_allclose(received[1], velocity, rtol=1e-5)
    kept = {name: array for name, array in exchange.checkpoint.gradients().items() if name.endswith(".momentum")}
    assert topology.rank > 0 or any(np.allclose(array, velocity) for array in kept.values() if array.shape == (50,))


@at_2_3_4
@pytest.mark.parametrize("values", WireValues)
def test_power_sgd_is_that_of_numpy(
    binding: ModuleType, runtime: ModuleType, num_ranks: int, values: WireValues
) -> None:
    topology = runtime.init()
    exchange = binding.Exchange([(60, 50)], topology, compression=method("powersgd", rank=2, values=values))
    dtype, atol = (np.float16, 0.02) if values is WireValues.fp16 else (np.float32, 2e-5)
    random = np.random.default_rng(0)
    factor, residuals = exchange.state()["factor"][0], [np.zeros((60, 50), np.float32)] * num_ranks
    for _ in range(3):
        of_ranks = list(random.standard_normal((num_ranks, 60, 50)).astype(np.float32))
        corrected = [matrix + residual for matrix, residual in zip(of_ranks, residuals, strict=True)]
        summed, residuals, factor = rules.power_sgd(corrected, factor, dtype)
        _, (received,) = exchange.step([of_ranks[topology.rank]])
        np.testing.assert_allclose(received, summed, atol=atol)
        np.testing.assert_allclose(exchange.state()["residual"][0], residuals[topology.rank], atol=atol)


@at_2
@pytest.mark.parametrize("magnitude", [1e-9, 1.0, 1e6])
def test_in_half_precision_power_sgd_sends_gradients_of_any_magnitude(
    binding: ModuleType, runtime: ModuleType, num_ranks: int, magnitude: float
) -> None:
    topology = runtime.init()
    exchange = binding.Exchange([(60, 50)], topology, compression=method("powersgd", values=WireValues.fp16))
    random = np.random.default_rng(0)
    matrix = np.float32(magnitude) * np.outer(random.standard_normal(60), random.standard_normal(50)).astype(np.float32)
    for _ in range(3):  # later steps start from a factor as small as the gradient
        _, (received,) = exchange.step([matrix])
        assert np.linalg.norm(received - num_ranks * matrix) < 0.01 * np.linalg.norm(num_ranks * matrix)


@at_2_3_4
@pytest.mark.parametrize(
    ("name", "changes"),
    [("fp16", {}), ("topk", {"ratio": 1.0}), ("randomk", {"ratio": 1.0}), ("dgc", {"ratio": 1.0, "momentum": 0.0})],
)
def test_what_half_precision_cannot_hold_is_sent_later(
    binding: ModuleType, runtime: ModuleType, num_ranks: int, name: str, changes: dict[str, Any]
) -> None:
    topology = runtime.init()
    half = {} if name == "fp16" else {"values": WireValues.fp16}
    cfg = method(name, error_feedback=True, **changes, **half)
    exchange = binding.Exchange([(SIZE,)], topology, compression=cfg)
    gradient = np.where(np.arange(SIZE) % 2, 1e6, -1e5).astype(np.float32)
    _, (received,) = exchange.step([gradient])
    assert np.isfinite(received).all()
    assert np.abs(received).max() <= num_ranks * 65504
    residuals = np.sum(runtime.allgather_object(exchange.state()["residual"][0].tolist()), axis=0)
    # Sums that are made in half precision are rounded, by 16 where they are beyond 32,768.
    np.testing.assert_allclose(received + residuals, num_ranks * gradient, atol=16 if name == "randomk" else 0.5)


@at_2_3_4
def test_adasum_is_that_of_numpy(binding: ModuleType, runtime: ModuleType, num_ranks: int) -> None:
    topology = runtime.init()
    exchange = binding.Exchange(SHAPES, topology, op=ReduceOp.adasum)
    random = np.random.default_rng(0)
    of_ranks = [[random.standard_normal(shape).astype(np.float32) for shape in SHAPES] for _ in range(num_ranks)]
    of_ranks[0][1][:] = 0
    # A rank's share of the mean is 1 / num_ranks of its own mean gradient.
    _, received = exchange.step([array / np.float32(num_ranks) for array in of_ranks[topology.rank]])
    for array, expected in zip(received, rules.adasum(of_ranks), strict=True):
        np.testing.assert_allclose(array, expected, atol=1e-6)


@at_2
@pytest.mark.parametrize("cfg", [("qsgd", 2), ("qsgd", 3), ("qsgd", 8), ("terngrad", 0.0)], ids=str)
def test_random_codes_are_right_on_average(binding: ModuleType, runtime: ModuleType, cfg: tuple[str, float]) -> None:
    name, value = cfg
    bits = int(value) or 2
    values = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    changes = {"bits": bits} if name == "qsgd" else {"clip": 0.0}
    exchange = binding.Exchange([(64,)], runtime.init(), compression=method(name, **changes))
    draws = exchange.coded(np.tile(values, (10_000, 1)))
    step = np.abs(values).max() / (2 ** (bits - 1) - 1)
    assert np.abs(draws - values).max() < step * 1.0001
    assert np.abs(draws.mean(0) - values).max() < 5 * step / 2 / math.sqrt(10_000)
    assert len(np.unique(draws.round(5))) <= 2**bits - 1


@at_2_3
@pytest.mark.parametrize(
    ("name", "scope"), [*((name, Scope.bucket) for name in METHODS), ("sign", Scope.layer), ("topk", Scope.layer)]
)
def test_twenty_steps_lose_nothing_and_leave_all_ranks_alike(
    binding: ModuleType, runtime: ModuleType, num_ranks: int, name: str, scope: Scope
) -> None:
    topology = runtime.init()
    changes = {"momentum": 0.0} if name == "dgc" else {}
    exchange = binding.Exchange(SHAPES, topology, compression=method(name, error_feedback=True, scope=scope, **changes))
    weights, given = [np.zeros(shape, np.float32) for shape in SHAPES], [np.zeros(shape) for shape in SHAPES]
    random = np.random.default_rng(topology.rank)
    for _ in range(20):
        gradients = [random.standard_normal(shape).astype(np.float32) for shape in SHAPES]
        _, received = exchange.step(gradients)
        weights = [weight + gradient for weight, gradient in zip(weights, received, strict=True)]
        given = [total + gradient for total, gradient in zip(given, gradients, strict=True)]
    digest = hashlib.sha256(b"".join(weight.tobytes() for weight in weights)).hexdigest()
    assert len(set(runtime.allgather_object(digest))) == 1
    residuals = {
        int(re.findall(r"\d+", key)[1]): array
        for key, array in exchange.checkpoint.gradients().items()
        if key.endswith("residual")
    }
    mine = {str(index): array for index, array in enumerate(given)}
    received = runtime.exchange_arrays([mine, *[{}] * (num_ranks - 1)])
    for index, weight in enumerate(weights if topology.rank == 0 else []):  # rank 0 has the whole state
        total = np.sum([of_rank[str(index)] for of_rank in received], axis=0)
        np.testing.assert_allclose(weight + residuals.get(index, 0), total, rtol=1e-4, atol=1e-4)


MLP = [(512, 784), (512,), (512, 512), (512,), (10, 512), (10,)]
NUM_VALUES = 669_706


def code_bytes(bits: int, num_values: int, num_ranks: int) -> int:
    """Both phases of a code of some bits a value with a scale for each 1,024, of pieces of a multiple of 8."""
    piece = 8 * math.ceil(num_values / num_ranks / 8)
    return 2 * (num_ranks - 1) * (piece * bits // 8 + (4 * math.ceil(piece / 1024) if bits < 16 else 0))


@at_2_3_4
@pytest.mark.parametrize("name", METHODS)
def test_bytes_on_the_wire(binding: ModuleType, runtime: ModuleType, num_ranks: int, name: str) -> None:
    topology = runtime.init()
    ring = 2 * (num_ranks - 1) / num_ranks
    k = math.ceil(NUM_VALUES / 100)
    expected = {
        **{name: code_bytes(bits, NUM_VALUES, num_ranks) for name, bits in (("fp16", 16), ("bf16", 16), ("int8", 8))},
        **{name: code_bytes(bits, NUM_VALUES, num_ranks) for name, bits in (("qsgd", 4), ("terngrad", 2), ("sign", 1))},
        **{"topk": 8 * k * (num_ranks - 1), "dgc": 6 * k * (num_ranks - 1), "randomk": round(ring * 4 * k)},
    }
    dgc = {"ratio": 0.01, "warmup_steps": 0, "values": WireValues.fp16}
    changes: dict[str, dict[str, Any]] = {"qsgd": {"bits": 4}, "dgc": dgc}
    zeros = [np.zeros(shape, np.float32) for shape in MLP]
    for rank, elements in ((1, 3_876), (2, 6_718), (4, 12_402)) if name == "powersgd" else ((0, 0),):
        rank_of = {"rank": rank} if rank else {}
        exchange = binding.Exchange(MLP, topology, compression=method(name, **changes.get(name, {}), **rank_of))
        sums, _ = exchange.step(zeros)
        sent = sum(float(num_bytes) for num_bytes in sums.wire_bytes)
        # Each factor and the uncompressed biases are rounded to whole bytes on their own.
        assert sent == pytest.approx(expected.get(name, ring * 4 * elements), abs=2)


@at_2
def test_small_weights_and_first_steps_travel_uncompressed(
    binding: ModuleType, runtime: ModuleType, num_ranks: int
) -> None:
    topology = runtime.init()
    exchange = binding.Exchange(SHAPES, topology, compression=method("sign", min_numel=2500, start_step=3))
    of_ranks = [
        [np.full(shape, rank + 1, np.float32) * np.float32(1.5) for shape in SHAPES] for rank in range(num_ranks)
    ]
    for gradients in of_ranks:
        gradients[0][::2], gradients[3][0] = 0.25, 0.25
    dense = sum(of_rank[0] for of_rank in of_ranks)
    for step in range(1, 4):
        _, received = exchange.step(of_ranks[topology.rank])
        assert np.array_equal(received[0], dense) == (step < 3)
        np.testing.assert_array_equal(received[1], sum(of_rank[1] for of_rank in of_ranks))


@at_2
def test_health_tells_how_far_the_applied_gradient_is_from_the_true_one(
    binding: ModuleType, runtime: ModuleType, num_ranks: int
) -> None:
    topology = runtime.init()
    exchange = binding.Exchange([(SIZE,)], topology, compression=method("topk", health=True))
    of_ranks = vectors(num_ranks)
    summed, errors = rules.top_k(of_ranks, 0.01)
    sums, _ = exchange.step([of_ranks[topology.rank]])
    true = sum(of_ranks)
    cosine = float(true @ summed / np.linalg.norm(true) / np.linalg.norm(summed))
    assert float(sums.gradient_cosine) == pytest.approx(cosine, rel=1e-4)
    assert float(sums.residual_norm) == pytest.approx(math.sqrt(sum((error**2).sum() for error in errors)), rel=1e-4)


@at_1_2_4
@pytest.mark.parametrize("name", ["topk", "dgc", "powersgd"])
def test_a_checkpoint_keeps_what_is_summed_at_any_number_of_ranks(
    binding: ModuleType, runtime: ModuleType, name: str
) -> None:
    topology = runtime.init()
    exchange = binding.Exchange([(60, 50)], topology, compression=method(name))
    random = np.random.default_rng(0)
    arrays = {key: random.standard_normal(array.shape) for key, array in exchange.checkpoint.gradients().items()}
    arrays = {key: array.astype(np.float32) for key, array in arrays.items()} | {
        "counters": np.array([7.0, 1.0, 0.0, 2.0])
    }
    exchange.restore(arrays)
    kept = exchange.checkpoint.gradients()
    if topology.rank == 0:  # which has the whole state
        assert kept.keys() == arrays.keys()
    for key, array in arrays.items() if topology.rank == 0 else ():
        np.testing.assert_allclose(kept[key], array, rtol=1e-6)


@at_2_3_4
def test_an_overflow_on_one_rank_is_seen_by_all_and_keeps_the_state(
    binding: ModuleType, runtime: ModuleType, num_ranks: int
) -> None:
    topology = runtime.init()
    cfg = method("topk")
    exchange = binding.Exchange([(SIZE,)], topology, compression=cfg, loss_scale=LossScale(1024.0, growth_steps=2))
    of_ranks = vectors(num_ranks)
    scales = []
    for step in range(5):
        gradient = of_ranks[topology.rank].copy()
        if step == 1 and topology.rank == num_ranks - 1:
            gradient[5] = np.inf
        before = exchange.state()["residual"][0]
        sums, _ = exchange.step([gradient])
        scales.append(float(sums.loss_scale))
        assert float(sums.overflow) == (step == 1)
        assert np.array_equal(before, exchange.state()["residual"][0]) == (step == 1)
    assert scales == [1024, 1024, 512, 512, 1024]

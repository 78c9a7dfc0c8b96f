"""Both bindings against numpy, on real ranks."""

import dataclasses
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from common.config.schema import AdamWConfig, OptimizerConfig, SGDConfig
from common.data.sampler import part
from common.distributed import array_exchange
from common.distributed.topology import Topology
from common.errors import ConfigError
from common.training import preemption
from tests.helpers import small_model

import numpy as np
import pytest

SGD = SGDConfig("sgd", lr=0.1, momentum=0.9)
ADAMW = AdamWConfig("adamw", lr=0.1, beta1=0.8, beta2=0.9, epsilon=0.1, weight_decay=0.0, freeze_step=0)
FROZEN = dataclasses.replace(ADAMW, freeze_step=2)
ONE_BUCKET, MANY_BUCKETS = 10**6, 40

pytestmark = pytest.mark.ranks(2, 4)


def test_every_rank_gets_the_values_of_all(runtime: ModuleType, num_ranks: int) -> None:
    topology = runtime.init()
    assert (topology.world_size, topology.local_size) == (num_ranks, num_ranks)
    value = {"rank": topology.rank, "text": "ä" * topology.rank}  # of another length on each rank
    assert runtime.allgather_object(value) == [{"rank": rank, "text": "ä" * rank} for rank in range(num_ranks)]
    assert runtime.broadcast_object(topology.rank) == 0
    assert runtime.sum_over_ranks(1, 0.5 * topology.rank) == [num_ranks, 0.25 * num_ranks * (num_ranks - 1)]


def test_arrays_reach_their_rank_in_any_number_of_messages(
    runtime: ModuleType, num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = runtime.init().rank
    monkeypatch.setattr(array_exchange, "PIECE_BYTES", 16)

    def arrays(sender: int, receiver: int) -> dict[str, np.ndarray]:  # another number for each pair, or none
        values = np.arange(3, dtype=np.float32) + 10 * sender + receiver
        return {f"{sender}.{number}": values + number for number in range(sender * receiver)}

    received = runtime.exchange_arrays([arrays(rank, receiver) for receiver in range(num_ranks)])
    for sender, of_rank in enumerate(received):
        expected = arrays(sender, rank)
        assert of_rank.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(of_rank[name], array)


def test_what_one_rank_finds_wrong_all_raise_once(runtime: ModuleType) -> None:
    rank = runtime.init().rank

    def check() -> None:
        with runtime.raise_on_all_ranks():
            if rank > 0:
                raise ConfigError(["same on all but rank 0", f"rank {min(rank, 2)}"])

    with pytest.raises(ConfigError) as error:
        check()
    assert error.value.problems[:2] == ["same on all but rank 0", "rank 1"]
    assert len(set(error.value.problems)) == len(error.value.problems)
    with runtime.raise_on_all_ranks():
        pass


@pytest.mark.parametrize("bucket_bytes", [ONE_BUCKET, MANY_BUCKETS])
@pytest.mark.parametrize("num_micro_batches", [1, 3])
@pytest.mark.parametrize("num_examples", [3, 17])  # with 4 ranks, 3 leave one without an example
def test_gradients_are_the_mean_over_the_global_batch(
    framework: str, runtime: ModuleType, num_examples: int, num_micro_batches: int, bucket_bytes: int
) -> None:
    topology = runtime.init()
    weights = small_model.initial_weights(0)
    inputs = np.random.default_rng(1).standard_normal((num_examples, 5))
    model = small_model.build(framework, weights, SGD, topology)
    sums = model.gradients(inputs[part(num_examples, topology)], num_examples, num_micro_batches, bucket_bytes)
    loss, expected = small_model.reference(weights, inputs)
    assert float(sums.loss) == pytest.approx(loss)
    assert float(sums.global_grad_sqnorm) == pytest.approx(squares(expected))
    for gradient, reference in zip(model.exchanged(max_norm=0), expected, strict=True):
        np.testing.assert_allclose(gradient, reference, rtol=1e-12, atol=1e-14)


def squares(gradients: Sequence[np.ndarray]) -> float:
    return float(sum((gradient**2).sum() for gradient in gradients))


@pytest.mark.parametrize("bucket_bytes", [ONE_BUCKET, MANY_BUCKETS])
def test_scalars_travel_with_the_gradients(
    framework: str, runtime: ModuleType, num_ranks: int, bucket_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = runtime.init()
    monkeypatch.setattr(preemption, "_requested", topology.rank == 0)
    weights = small_model.initial_weights(0)
    inputs = np.random.default_rng(1).standard_normal((17, 5))
    model = small_model.build(framework, weights, SGD, topology)
    sums = model.gradients(inputs[part(17, topology)], 17, 2, bucket_bytes)
    parts = [part(17, Topology(rank, num_ranks, rank, num_ranks)) for rank in range(num_ranks)]
    local = [squares(small_model.reference(weights, inputs[of_rank])[1]) for of_rank in parts]
    assert float(sums.stop) == 1
    assert float(sums.local_grad_sqnorm) == pytest.approx(np.sum(local))


def recorded(name: str, method: Callable[..., Any], events: list[str]) -> Callable[..., Any]:
    """The method, which notes its calls and their arguments."""

    def record(self: object, *arguments: int) -> Any:
        events.append(" ".join([name, *map(str, arguments)]))
        return method(self, *arguments)

    return record


@pytest.mark.ranks(2, 4, framework="torch")  # TensorFlow's executor orders operations by their data alone
def test_buckets_leave_while_backward_runs(
    framework: str, runtime: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from common.torch.gradients.allreduce import AllreduceSync
    from common.torch.gradients.bucket_exchange import BucketExchange

    topology = runtime.init()
    events: list[str] = []
    for kind, name in ((BucketExchange, "_send"), (AllreduceSync, "synchronize")):
        monkeypatch.setattr(kind, name, recorded(name, getattr(kind, name), events))
    model = small_model.build(framework, small_model.initial_weights(0), SGD, topology)
    model.gradients(np.ones((2, 5)), 2 * topology.world_size, 2, MANY_BUCKETS)
    assert events == ["_send 0", "_send 1", "_send 2", "_send 3", "synchronize"]


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_the_global_norm_is_clipped_only_when_larger(framework: str, runtime: ModuleType, factor: float) -> None:
    topology = runtime.init()
    weights = small_model.initial_weights(0)
    inputs = np.random.default_rng(1).standard_normal((8, 5))
    _, expected = small_model.reference(weights, inputs)
    norm = float(np.sqrt(squares(expected)))
    model = small_model.build(framework, weights, SGD, topology)
    model.gradients(inputs[part(8, topology)], 8, 1, MANY_BUCKETS)
    for gradient, reference in zip(model.exchanged(max_norm=factor * norm), expected, strict=True):
        np.testing.assert_allclose(gradient, min(1.0, factor) * reference, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("cfg", [SGD, ADAMW, FROZEN], ids=["sgd", "adamw", "frozen"])
def test_optimizers_follow_their_formulas_while_the_rate_changes(
    framework: str, runtime: ModuleType, cfg: OptimizerConfig
) -> None:
    topology = runtime.init()
    weights = small_model.initial_weights(0)
    model = small_model.build(framework, weights, cfg, topology)
    state: dict[str, object] = {}
    for step, rate in enumerate((0.01, 0.1, 0.02, 0.05)):
        inputs = np.random.default_rng(step).standard_normal((9, 5))
        inputs[:, 0] *= step > 1  # the first row of weights has no gradient before
        metrics = model.gradients(inputs[part(9, topology)], 9, 1, ONE_BUCKET)
        model.step(rate, metrics)
        _, expected = small_model.reference(weights, inputs)
        changes = small_model.updates(cfg, expected, state, rate)
        weights = [weight + change for weight, change in zip(weights, changes, strict=True)]
    for weight, reference in zip(model.weights, weights, strict=True):
        np.testing.assert_allclose(weight, reference, rtol=1e-6)


def test_weight_decay_is_for_matrices(framework: str, runtime: ModuleType) -> None:
    cfg = dataclasses.replace(ADAMW, weight_decay=0.5)
    topology = runtime.init()
    before = small_model.initial_weights(0)
    model = small_model.build(framework, before, cfg, topology)
    # Gradients of next to nothing: decay is what is left.
    metrics = model.gradients(np.ones((1, 5)), 2**31 - 1, 1, ONE_BUCKET)
    model.step(0.1, metrics)
    for weight, old in zip(model.weights, before, strict=True):
        np.testing.assert_allclose(weight, old * (0.95 if old.ndim == 2 else 1.0), rtol=1e-6)


def test_optimizer_state_that_only_rank_zero_has_reaches_all(framework: str, runtime: ModuleType) -> None:
    topology = runtime.init()
    if framework == "torch":
        import torch

        model: Any = torch.nn.Linear(3, 2)
        optimizer: Any = torch.optim.Adam(model.parameters(), 0.1 if topology.rank == 0 else 0.5)

        def step() -> None:
            optimizer.zero_grad()
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
    else:
        import keras

        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        optimizer = keras.optimizers.Adam(0.1 if topology.rank == 0 else 0.5)

        def step() -> None:
            optimizer.apply([0.5 * keras.ops.ones_like(variable) for variable in model.weights], model.weights)

    if topology.rank == 0:
        for _ in range(3):
            step()
    runtime.broadcast_state(model, optimizer)
    runtime.assert_weights_in_sync(model)
    step()  # with other moments, numbers of steps or learning rates the weights would part
    runtime.assert_weights_in_sync(model)


def test_all_ranks_start_from_rank_zeros_weights(framework: str, runtime: ModuleType) -> None:
    topology = runtime.init()
    model = small_model.build(framework, small_model.initial_weights(topology.rank), SGD, topology)
    model.broadcast()
    for weight, expected in zip(model.weights, small_model.initial_weights(0), strict=True):
        np.testing.assert_array_equal(weight, expected)

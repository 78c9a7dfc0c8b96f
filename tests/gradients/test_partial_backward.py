"""Backward passes that do not reach every parameter once, on real ranks.

TensorFlow hands out all gradients of a step at once, and which ones are missing is the same on all ranks: nothing here
can go wrong there.
"""

from collections.abc import Callable
from typing import Any

from common.distributed.topology import Topology
from common.errors import TrainingError
from common.gradients.gradient_sync import SyncOptions
from tests.helpers.compressors import method

import pytest

pytestmark = pytest.mark.ranks(2, framework="torch")
ALONE = Topology(0, 1, 0, 1)


def topology() -> Topology:
    from common.torch.distributed import runtime

    return runtime.init()


def steps(gradients: Any, optimizer: Any, loss: Callable[[], Any], num_steps: int = 5) -> None:
    """Steps with a rank's share of the loss."""
    for _ in range(num_steps):
        gradients.zero()
        gradients.prepare_for_backward()
        loss().backward()
        gradients.synchronize()
        optimizer.step()


def after_five_steps(place: Topology, **options: Any) -> dict[str, list[float]]:
    """Weights of which one has no gradient, and one has it on the last rank alone."""
    from common.torch.gradients.allreduce import AllreduceSync

    import torch

    model = torch.nn.ParameterDict({name: torch.ones(3) for name in ("used", "unused", "of_one_rank")})
    gradients = AllreduceSync(model.named_parameters(), place, SyncOptions(**options))

    def loss() -> Any:
        last = place.rank == place.world_size - 1
        return model["used"].sum() / place.world_size + (model["of_one_rank"].sum() if last else 0)

    steps(gradients, torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.5), loss)
    assert model["unused"].grad is None
    return {name: parameter.tolist() for name, parameter in model.items()}


def test_a_parameter_without_a_gradient_is_left_alone_as_on_one_rank() -> None:
    weights = after_five_steps(topology())
    assert weights["unused"] == [1, 1, 1]
    for name, values in after_five_steps(ALONE).items():
        assert weights[name] == pytest.approx(values)
    assert after_five_steps(topology(), compression=method("topk"))["unused"] == [1, 1, 1]


def test_a_parameter_that_is_unfrozen_later_is_found_out() -> None:
    from common.torch.gradients.allreduce import AllreduceSync

    import torch

    model = torch.nn.ParameterDict({name: torch.ones(3) for name in ("first", "second")})
    model["second"].requires_grad = False
    gradients = AllreduceSync(model.named_parameters(), topology())
    model["second"].requires_grad = True
    with pytest.raises(TrainingError, match="parameter second was frozen and is trained now"):
        gradients.zero()


@pytest.mark.parametrize("how", ["two passes", "reentrant checkpointing"])
def test_a_gradient_that_changes_after_it_has_left_is_found_out_on_all_ranks(how: str) -> None:
    from common.torch.gradients.allreduce import AllreduceSync

    import torch
    from torch.utils.checkpoint import checkpoint

    shared, last = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(shared, last)
    gradients = AllreduceSync(model.named_parameters(), topology(), SyncOptions(bucket_bytes=16))
    inputs = torch.ones(2, 4, requires_grad=True)
    gradients.zero()
    gradients.prepare_for_backward()
    if how == "two passes":
        for _ in range(2):
            model(inputs).sum().backward()
    else:
        hidden = checkpoint(shared, checkpoint(shared, inputs, use_reentrant=True), use_reentrant=True)
        last(hidden).sum().backward()
    with pytest.raises(TrainingError, match=r"added to the gradients of 0\.weight.* after they had left"):
        gradients.synchronize()


def test_the_last_of_several_passes_may_be_the_one_that_sends() -> None:
    from common.torch.gradients.allreduce import AllreduceSync

    import torch

    place = topology()
    model = torch.nn.Linear(4, 1)
    gradients = AllreduceSync(model.named_parameters(), place, SyncOptions(bucket_bytes=8))
    gradients.zero()
    model(torch.ones(1, 4)).sum().backward()
    gradients.prepare_for_backward()
    model(torch.ones(1, 4)).sum().backward()
    gradients.synchronize()
    assert model.bias.grad is not None
    assert model.bias.grad.tolist() == [2 * place.world_size]


def test_pieces_of_a_sharded_optimizer_need_all_gradients() -> None:
    from common.config.composition import option
    from common.parallel.rank_schedule import RankSchedule
    from common.torch.gradients.allreduce import AllreduceSync
    from common.torch.parallel.sharded import ShardedOptimizer
    from common.torch.parallel.stage import Stage

    import torch

    place = topology()
    layers = [torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)]
    stage = Stage(layers, [range(2)], option("precision", "fp32"), RankSchedule("1f1b", 1, 1, place))
    optimizer = ShardedOptimizer(option("optimizer", "adamw"), stage, range(place.world_size))
    gradients = AllreduceSync(stage.named_parameters(), place)
    with pytest.raises(TrainingError, match=r"optimizer.sharded=true: 1.weight, 1.bias got no gradient on any rank"):
        steps(gradients, optimizer, lambda: layers[0](torch.ones(1, 3)).sum(), num_steps=1)

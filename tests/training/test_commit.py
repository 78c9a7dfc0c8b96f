"""The newest commit of any rank is the one from which all go on."""

from types import ModuleType

from common.training.checkpoint_files import MEMORY, Checkpoint
from common.training.elastic import Membership

import numpy as np
import pytest


@pytest.mark.ranks(3)
@pytest.mark.parametrize("steps", [(10, 10, -1), (10, 20, -1), (-1, -1, -1)])
def test_rank_0_gets_the_newest_commit(steps: tuple[int, ...], runtime: ModuleType) -> None:
    rank, members = runtime.init().rank, Membership()
    first, second, third = ({"1.weight": np.full((2, 3), 10.0 * steps[rank] + part)} for part in range(3))
    if steps[rank] >= 0:
        members.commit = Checkpoint(MEMORY, first, second, third, {"position": {"step": steps[rank]}})
    newest = members.newest(runtime, rank)
    if rank or max(steps) < 0:
        assert newest is None
        return
    assert newest is not None
    assert newest.state["position"]["step"] == max(steps)
    for part, found in enumerate((newest.weights, newest.optimizer_state, newest.gradients)):
        np.testing.assert_array_equal(found["1.weight"], np.full((2, 3), 10.0 * max(steps) + part))

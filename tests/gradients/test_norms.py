"""Norms of long vectors are as exact as those of short ones."""

from tests.helpers.launch import FRAMEWORKS

import pytest

if "torch" in FRAMEWORKS:
    from common.torch.gradients.norms import norm

    import torch


@pytest.mark.skipif("torch" not in FRAMEWORKS, reason="TensorFlow's own are exact")
@pytest.mark.parametrize("shapes", [[(6_553_601,)], [(670, 1000), (), (1,), (4096,)], [(0,), (3, 5)], [(0,)], []])
def test_the_norm_does_not_depend_on_how_long_a_vector_is(shapes: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(shape) for shape in shapes]
    expected = sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5
    assert float(norm(tensors)) == pytest.approx(expected, rel=3e-7)

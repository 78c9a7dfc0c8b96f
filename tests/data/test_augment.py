"""Random numbers of examples, and images that are moved by them."""

from common.data.datasets.augment import shift_and_turn, uniform

import numpy as np
import pytest


def test_random_numbers_depend_on_seed_epoch_and_example_alone() -> None:
    numbers = np.arange(20_000)
    drawn = uniform(1, 2, numbers, 3)
    assert np.array_equal(drawn[[7, 5]], uniform(1, 2, np.array([7, 5]), 3))
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert np.abs(drawn.mean(axis=0) - 0.5).max() < 0.01
    assert (
        np.abs(np.corrcoef([*drawn.T, *uniform(1, 3, numbers, 3).T, *uniform(2, 2, numbers, 3).T]) - np.eye(9)).max()
        < 0.03
    )


def test_images_are_shifted_and_turned() -> None:
    image = np.zeros((28, 28), np.float32)
    image[5, 9] = 1
    images = np.stack([image] * 3)
    moved = shift_and_turn(images, np.array([[0, 0], [2, -3], [0, 0]]), np.array([0, 0, np.pi / 2]))
    assert np.array_equal(moved[0], image)
    assert np.argwhere(moved[1] > 0.99).tolist() == [[7, 6]]
    assert np.argwhere(moved[2] > 0.99).tolist() == [[9, 22]]
    assert shift_and_turn(images, np.full((3, 2), 14), np.zeros(3)).sum() == pytest.approx(3)

"""Each rank's part of global batches, for scripts outside the recipes; order and parts are the same as in recipes."""

from common.data.sampler import part, shuffled
from common.distributed.topology import Topology

import numpy as np


def of_epoch(
    num_examples: int, global_batch_size: int, topology: Topology, seed: int, epoch: int, shuffle: bool = True
) -> list[tuple[np.ndarray, int]]:
    """One rank's examples in each step of an epoch.

    Args:
        num_examples: size of the dataset.
        global_batch_size: number of examples per step over all ranks; the last step has the remaining examples.
        topology: the place of the rank.
        seed: determines the order together with the epoch.
        epoch: number of the epoch, from 1.
        shuffle: False keeps the order of the dataset.

    Returns:
        For each step, the numbers of this rank's examples, (n,) int64, and the number of examples of all ranks. In the
        last step n may be 0.

    Raises:
        ValueError: num_examples or global_batch_size is less than 1.
    """
    if num_examples < 1 or global_batch_size < 1:
        raise ValueError(
            f"there must be examples and at least 1 of them in a batch. "
            f"Received: num_examples={num_examples}, global_batch_size={global_batch_size}"
        )
    order = shuffled(num_examples, seed, epoch) if shuffle else np.arange(num_examples)
    batches = [order[start : start + global_batch_size] for start in range(0, num_examples, global_batch_size)]
    return [(batch[part(len(batch), topology)], len(batch)) for batch in batches]

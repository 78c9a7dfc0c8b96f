"""For user-written training loops, together with AllreduceSync and runtime: data and averaged statistics.

See docs/your-own-script.md.
"""

from collections.abc import Callable, Iterator, Sized
from functools import partial
from typing import Any

from common.data import batches
from common.distributed.topology import Topology

import horovod.torch as hvd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate


class ShardedBatches:
    """This rank's part of each global batch of a dataset, in the same order as in the recipes.

    The batches of an epoch are consecutive pieces of a permutation of the examples; the ranks' parts of a batch differ
    by at most one example. In an epoch's last step a rank may have no examples: its tensors then have size 0, and it
    must still take part in the step.

    Args:
        dataset: a dataset with a length and with examples by number.
        global_batch_size: number of examples per step over all ranks; an epoch's last step has the remaining ones.
        topology: the place of this rank.
        seed: determines the order together with the epoch.
        shuffle: False keeps the order of the dataset, for evaluation.
        collate: makes a batch from a list of at least one example: a nest of tuples, lists and dicts of tensors.
        options: options of torch's DataLoader, such as num_workers and pin_memory.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        global_batch_size: int,
        topology: Topology,
        *,
        seed: int = 0,
        shuffle: bool = True,
        collate: Callable[[list[Any]], Any] = default_collate,
        **options: Any,
    ) -> None:
        if not isinstance(dataset, Sized):
            raise TypeError(f"the dataset must have a length. Received: {type(dataset).__name__}")
        self._dataset, self._options = dataset, options
        self._of_epoch = partial(batches.of_epoch, len(dataset), global_batch_size, topology, seed, shuffle=shuffle)
        self._collate = partial(_collate, dataset, collate)

    def epoch(self, number: int = 1) -> Iterator[tuple[Any, int]]:
        """The batches of an epoch (from 1), each with the number of examples over all ranks in that step."""
        steps = self._of_epoch(epoch=number)
        examples = [part.tolist() for part, _ in steps]
        loader = DataLoader(self._dataset, batch_sampler=examples, collate_fn=self._collate, **self._options)
        return zip(loader, (global_size for _, global_size in steps), strict=True)


def _collate(dataset: Dataset[Any], collate: Callable[[list[Any]], Any], examples: list[Any]) -> Any:
    """The examples as a batch; without examples, a batch of size 0 with the same structure."""
    return collate(examples) if examples else _emptied(collate([dataset[0]]))


def _emptied(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch[:0]
    if isinstance(batch, dict):
        return {name: _emptied(value) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [_emptied(value) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    raise TypeError(f"a batch must be made of tensors, tuples, lists and dicts. Received: {type(batch).__name__}")


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Averages the layers' running statistics, such as those of BatchNorm, over all ranks.

    Must be called before the model is evaluated, saved or compared, because each rank tracks only its examples.
    """
    buffers = [buffer for buffer in model.state_dict(keep_vars=True).values() if not isinstance(buffer, nn.Parameter)]
    floats = [buffer for buffer in buffers if buffer.is_floating_point()]
    if floats:
        flat = torch.cat([buffer.double().flatten() for buffer in floats])  # the mean of equal numbers is exact
        mean = hvd.allreduce(flat, name="statistics", op=hvd.Sum) / hvd.size()
        for buffer, part in zip(floats, mean.split([buffer.numel() for buffer in floats]), strict=True):
            buffer.copy_(part.view_as(buffer))

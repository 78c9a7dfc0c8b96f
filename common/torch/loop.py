"""What a training loop of one's own needs besides Gradients and runtime (docs/your-own-script.md)."""

from collections.abc import Callable, Iterator, Sized
from functools import partial
from typing import Any

from common import batches
from common.topology import Topology

import horovod.torch as hvd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate


class ShardedBatches:
    """This rank's part of each global batch of a dataset, in the recipes' order.

    An epoch's batches are a permutation of the examples, cut into pieces; ranks' parts of a piece differ by one
    example at most. In an epoch's last step a rank may have none: its tensors then have size 0, and it must take part
    in the step all the same.

    Args:
        dataset: with a length and examples by number.
        global_batch_size: examples per step over all ranks; an epoch's last step has what is left.
        topology: whose part is taken.
        seed: decides the order together with the epoch.
        shuffle: False takes the examples as they come, to evaluate.
        collate: makes a batch of a list of at least one example: a nest of tuples, lists and dicts of tensors.
        options: of torch's DataLoader, such as num_workers and pin_memory.
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
        """The batches of an epoch (from 1), each with the number of examples of all ranks in that step."""
        steps = self._of_epoch(epoch=number)
        examples = [part.tolist() for part, _ in steps]
        loader = DataLoader(self._dataset, batch_sampler=examples, collate_fn=self._collate, **self._options)
        return zip(loader, (global_size for _, global_size in steps), strict=True)


def _collate(dataset: Dataset[Any], collate: Callable[[list[Any]], Any], examples: list[Any]) -> Any:
    """The examples as a batch; of none, one of size 0 that is otherwise as any other."""
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
    """Gives all ranks the mean of what layers keep track of without gradients, as BatchNorm does.

    To be called before the model is evaluated, saved or compared: every rank has tracked its own examples.
    """
    buffers = [buffer for buffer in model.state_dict(keep_vars=True).values() if not isinstance(buffer, nn.Parameter)]
    floats = [buffer for buffer in buffers if buffer.is_floating_point()]
    if floats:
        flat = torch.cat([buffer.double().flatten() for buffer in floats])  # the mean of equal numbers stays exact
        mean = hvd.allreduce(flat, name="statistics", op=hvd.Sum) / hvd.size()
        for buffer, part in zip(floats, mean.split([buffer.numel() for buffer in floats]), strict=True):
            buffer.copy_(part.view_as(buffer))

"""Data-parallel training of a PyTorch loop of your own."""

import hashlib
import platform
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

from common.distributed import launcher_env, noise_kind
from common.distributed.restart import Restart
from common.distributed.topology import Topology
from common.errors import ConfigError, TrainingError
from common.gradients.gradient_sync import SyncOptions
from common.torch.distributed import runtime
from common.torch.script import losses as of_targets
from common.torch.script import no_rows, part, statistics
from common.torch.script import noise as of_steps
from common.torch.script.exchange import GradientExchange
from common.torch.script.loader import RankLoader
from common.torch.script.part import Part
from common.training import provenance

import horovod.torch as hvd
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset


def start(
    seed: int = 0,
    *,
    noise: str = "batch",
    losses: str = "mean",
    compression: str | Mapping[str, Any] = "none",
    op: str = "average",
) -> "Run":
    """Starts Horovod and seeds PyTorch alike on all ranks; to be called before the model is made.

    Args:
        seed: as that of torch.manual_seed.
        noise: "batch": dropout and noise are the rows of what one rank would draw for the global batch, so each rank
            draws for all of it. "rank": a rank draws for its rows alone, which costs less with many ranks.
        losses: whether a loss is the "mean" over its batch, or the "sum".
        compression: of the gradients: a name of conf/compression/, or {"name": "topk", "ratio": 0.01}.
        op: average or adasum.

    Raises:
        SystemExit: with status 2, if an argument is wrong; rank 0 prints why.
    """
    restart = Restart(runtime)
    topology = runtime.init()
    torch.manual_seed(seed)
    if topology.world_size > 1 or launcher_env.is_elastic():  # authors may draw with them without a seed
        random.seed(seed)
        np.random.seed(seed)
    with _refusals(topology):
        if losses not in ("mean", "sum"):
            raise ConfigError([f"losses={losses!r}: choose from mean, sum"])
        noise_kind.choose(noise)
        return Run(topology, SyncOptions.from_names(compression, op, seed), losses == "sum", restart)


@contextmanager
def _refusals(topology: Topology) -> Iterator[None]:
    """Ends the process with status 2 if the ranks cannot train together; rank 0 says why."""
    try:
        yield
    except ConfigError as error:
        if topology.rank == 0:
            print(error, file=sys.stderr, flush=True)
        sys.exit(2)


class Run:
    """Through it a plain loop trains on all ranks, with the losses and weights of one rank.

    With one rank, models and optimizers are returned as they are, and loaders give the batches of the author's. An
    elastic job may get more ranks; so there nothing is left as it is.

    Attributes:
        rank: the number of this rank; rank 0 writes and prints.
        world_size: number of ranks.
        device: this rank's GPU if there is one, else the CPU.
    """

    def __init__(self, topology: Topology, options: SyncOptions, is_sum: bool, restart: Restart) -> None:
        self.rank, self.world_size, self.device = topology.rank, topology.world_size, runtime.device(topology)
        self._topology, self._options, self._is_sum, self._restart = topology, options, is_sum, restart
        self._is_shared = self.world_size > 1 or launcher_env.is_elastic()  # or will be
        self._models: list[nn.Module] = []
        self._exchanges: list[GradientExchange] = []
        self._num_exchanges = 0  # when the last batch was drawn
        self._kept: list[tuple[Tensor, Tensor]] = []  # statistics, and their values before a batch that does not count
        if self._is_shared:
            of_steps.install(topology)
            of_targets.install()

    def prepare(self, *objects: Any, sync_batch_norm: bool = False) -> Any:
        """Makes models, optimizers and DataLoaders work on all ranks.

        All ranks begin with rank 0's weights, optimizer state and settings. A loader gives this rank's rows of each
        batch, in the author's order; its batch_size is the global one.

        Args:
            objects: models, optimizers and loaders, after a checkpoint was read if there is one (on rank 0 at least).
            sync_batch_norm: batch normalisation uses the statistics of the global batch.

        Returns:
            The same models and optimizers, and new loaders: one object, or a tuple in the order of the arguments.

        Raises:
            SystemExit: with status 2 on all ranks, if their models, optimizers, loaders or versions differ; rank 0
                prints why.
        """
        if self._is_shared:
            with _refusals(self._topology):
                runtime.check_alike(_facts(objects))
                objects = tuple(self._prepared(each, sync_batch_norm) for each in objects)
        else:  # loaders have a state, as with several ranks
            objects = tuple(
                RankLoader(each, self._topology, self) if isinstance(each, DataLoader) else each for each in objects
            )
        return objects[0] if len(objects) == 1 else objects

    def _prepared(self, given: Any, sync_batch_norm: bool) -> Any:
        if isinstance(given, nn.Module):
            self._prepare_model(given, sync_batch_norm)
        elif isinstance(given, torch.optim.Optimizer):
            runtime.broadcast_state(nn.Module(), given)
            given.register_step_pre_hook(self._before_step)
        elif isinstance(given, DataLoader):
            return RankLoader(given, self._topology, self)
        else:
            name = type(given).__name__
            raise ConfigError([f"prepare({name}): give it models, optimizers and DataLoaders of PyTorch"])
        return given

    def _prepare_model(self, model: nn.Module, sync_batch_norm: bool) -> None:
        runtime.broadcast_state(model, SimpleNamespace(param_groups=[], state={}))
        exchange = GradientExchange(model.named_parameters(), self._topology, self._options, self._is_sum)
        if sync_batch_norm:
            statistics.use_global_batch(model, exchange.current_weight)
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Embedding | nn.EmbeddingBag)]
        exchange.use_sparse([layer.weight for layer in layers if layer.sparse])
        self._models.append(model)
        self._exchanges.append(exchange)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """For gradient accumulation: backward within exchanges nothing; the last one of a step must be outside."""
        with ExitStack() as stack:
            for exchange in self._exchanges:
                stack.enter_context(exchange.no_sync())
            yield

    def mean(self, value: Tensor | float) -> float:
        """The mean over the global batch of a value that is the mean over this rank's rows, such as a loss."""
        number = float(value.detach()) if isinstance(value, Tensor) else float(value)
        if self.world_size == 1:
            return number
        weight = self._weight()
        return runtime.sum_over_ranks(number * weight if weight else 0.0)[0]

    def _weight(self) -> float:
        """This rank's weight in the last batch: that of its gradients, if they were exchanged, or of its rows."""
        last = part.last()
        exchanged = [each for each in self._exchanges if last and each.exchanged_part is last]
        if exchanged:
            return exchanged[-1].weight
        if self._is_sum:
            return float(not (last and last.is_empty))
        return last.share if last else 1 / self.world_size

    def sum(self, *values: Tensor | float) -> Any:
        """The sum of each value over the ranks, computed in float64: one float, or a list."""
        if self.world_size == 1:
            sums = [float(value) for value in values]
        else:
            sums = runtime.sum_over_ranks(*(float(value) for value in values))
        return sums[0] if len(sums) == 1 else sums

    def state_dict(self) -> dict[str, Any]:
        """The state of the compression, the same on all ranks, for any number of ranks; all ranks must call it."""
        found: dict[str, Any] = {}
        for number, exchange in enumerate(self._exchanges):
            for name, tensors in exchange.state().items():
                for key, tensor in tensors.items():
                    total = hvd.allreduce(tensor, op=hvd.Sum, name=f"script.state.{number}.{name}.{key}")
                    found.setdefault(str(number), {}).setdefault(name, {})[key] = total
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads the result of state_dict(), after prepare()."""
        for number, exchange in enumerate(self._exchanges):
            if str(number) in state:
                exchange.load(state[str(number)])

    def check_in_sync(self) -> None:
        """Compares the weights of all ranks; raises a TrainingError if they differ."""
        for model in self._models:
            runtime.assert_weights_in_sync(model)

    def begin_epoch(self) -> bool:
        """Called by a loader: all ranks take rank 0's state of the random generator."""
        part.set_current(None)
        torch.set_rng_state(hvd.broadcast(torch.get_rng_state(), 0, name="script.generator"))
        return torch.is_grad_enabled() and (not self._models or any(model.training for model in self._models))

    def check_order(self, print_of: str) -> None:
        """Called by a loader: compares the ranks' orders of the examples."""
        with _refusals(self._topology):
            if len(set(runtime.allgather_object(print_of))) > 1:
                raise ConfigError(
                    [
                        "the ranks' loaders draw other examples than each other: give their samplers the same seed, "
                        "and let all ranks make the same dataset"
                    ]
                )

    def begin_batch(self, of_step: Part, is_second: bool) -> None:
        """Called by a loader when it gives a batch."""
        self._restart.between_batches()
        before, self._num_exchanges = self._num_exchanges, sum(each.num_exchanges for each in self._exchanges)
        current = part.current()
        if is_second and current and current.share != of_step.share and self._num_exchanges == before:
            with _refusals(self._topology):
                raise ConfigError(
                    ["batches of different sizes are drawn for one step; give their loaders one batch_size"]
                )
        self._put_back()
        of_targets.forget()
        part.set_current(of_step)
        with _refusals(self._topology):
            for exchange in self._exchanges:
                exchange.prepare()
        if of_step.is_empty:
            buffers = [buffer for model in self._models for buffer in statistics.running(model)]
            self._kept = [(buffer, buffer.clone()) for buffer in buffers]

    def evaluating_no_rows(self) -> AbstractContextManager[None]:
        """Called by a loader when it gives a batch without rows."""
        return no_rows.allowed(self._models)

    def end_epoch(self, is_training: bool, order: str) -> None:
        """Called by a loader when it has given all batches."""
        self._put_back()
        part.set_current(None)
        self.check_order(order)
        if is_training:
            statistics.average(self._models, self._topology)

    def _put_back(self) -> None:
        for buffer, before in self._kept:
            buffer.copy_(before)
        self._kept = []

    def _check_owned(self, optimizer: torch.optim.Optimizer) -> None:
        known = {id(parameter) for model in self._models for parameter in model.parameters()}
        for group in optimizer.param_groups:
            if any(each.grad is not None and id(each) not in known for each in group["params"]):
                raise TrainingError(
                    "an optimizer has a parameter of no prepared model; put it into a module, and prepare it"
                )

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        """Hook of each optimizer; a closure's loss is that of the global batch, by which it searches along a line."""
        closure = kwargs.get("closure") or next((each for each in args if callable(each)), None)
        if closure is None:
            owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            for exchange in self._exchanges:
                if exchange.has_any(owned):
                    exchange.before_step(optimizer)
            self._check_owned(optimizer)
            return None

        def of_all_ranks() -> Tensor:
            loss = closure()
            return torch.as_tensor(loss).new_tensor(self.mean(loss))

        replaced = tuple(of_all_ranks if each is closure else each for each in args)
        return replaced, {name: of_all_ranks if value is closure else value for name, value in kwargs.items()}


def _fingerprint(dataset: Any) -> Any:
    """What tells a dataset from another one, as far as that is known without reading examples."""
    length = len(dataset) if hasattr(dataset, "__len__") else None
    if isinstance(dataset, Subset):
        indices = hashlib.sha256(repr(list(dataset.indices)).encode()).hexdigest()
        return [length, indices, _fingerprint(dataset.dataset)]
    if isinstance(dataset, TensorDataset):
        return [length, hashlib.sha256(part.fingerprint([tensor[:1000] for tensor in dataset.tensors])).hexdigest()]
    return length


def _facts(objects: Sequence[Any]) -> dict[str, Any]:
    """What must be the same on all ranks, by name."""
    weights = [
        [name, list(value.shape), str(value.dtype)]
        for model in objects
        if isinstance(model, nn.Module)
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    ]
    groups = [
        [type(optimizer).__name__, [len(group["params"]) for group in optimizer.param_groups]]
        for optimizer in objects
        if isinstance(optimizer, torch.optim.Optimizer)
    ]
    sets = [loader.dataset for loader in objects if isinstance(loader, DataLoader)]
    return {
        "kinds of objects": [type(each).__name__ for each in objects],
        "weights of the models": weights,
        "optimizers": groups,
        "datasets": [_fingerprint(each) for each in sets],
        "versions": {**provenance.versions(), "python": platform.python_version()},
    }


__all__ = ["Run", "start"]

"""Gives a model the gradients of all ranks at the end of each backward."""

import hashlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from common.distributed.topology import Topology
from common.errors import TrainingError
from common.gradients.gradient_sync import SyncOptions
from common.torch.distributed import runtime
from common.torch.gradients.allreduce import AllreduceSync
from common.torch.script import losses, part

import horovod.torch as hvd
import torch
from torch import Tensor, nn
from torch.autograd import Variable

# How far the sum of all ranks' weights is from 1 if all targets count.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}


_numbers = itertools.count()
_exchange_of: WeakKeyDictionary[nn.Parameter, "GradientExchange"] = WeakKeyDictionary()


class GradientExchange:
    """Sums the gradients of a model over the ranks whenever backward has ended.

    A rank's loss is a mean over its rows. Its gradients are multiplied by the rank's share of the rows before they are
    summed, so that the sums are the gradients of the mean over the global batch. Buckets are sent while backward still
    runs, one list of buckets per dtype. A gradient that no rank has stays None.

    Args:
        named: the parameters of a model, or of several, with their names.
        topology: the place of this rank.
        options: how gradients are summed.
        is_sum: whether losses are sums over the rows instead of means.

    Attributes:
        weight: this rank's weight in the means of the last exchange.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], topology: Topology, options: SyncOptions, is_sum: bool
    ) -> None:
        self._named, self._topology, self._is_sum = dict(named), topology, is_sum
        self._options = options.named(f"script.{next(_numbers)}")
        self._sparse = SparseRows({}, "")
        self._syncs: list[AllreduceSync] = []
        self._is_running = self._is_held_back = False
        self._has_exchanged = False
        self._held_share: float | None = None  # of the gradients that no_sync has kept back
        self._zeroing: list[Any] = []  # hooks that keep the next gradients from counting
        self._targets_per_row = 0.0
        self._trained: list[bool] = []
        self.weight = 1 / topology.world_size
        for parameter in self._named.values():
            if parameter in _exchange_of:
                _exchange_of[parameter].close()
            _exchange_of[parameter] = self
        self._hooks = {
            name: self._hook(parameter) for name, parameter in self._named.items() if parameter.requires_grad
        }

    def _hook(self, parameter: nn.Parameter) -> Any:
        """Must be registered before the hooks of the buckets."""
        return parameter.register_post_accumulate_grad_hook(self._begin)

    def close(self) -> None:
        """Lets the parameters go: a model that is prepared again has another exchange."""
        for hook in self._hooks.values():
            hook.remove()
        for sync in self._syncs:
            sync.close()
        self._named, self._syncs, self._sparse = {}, [], SparseRows({}, "")

    def use_sparse(self, parameters: Iterable[Tensor]) -> None:
        """Names the parameters whose gradients are sparse: their rows are gathered."""
        chosen = set(parameters)
        named = {name: parameter for name, parameter in self._named.items() if parameter in chosen}
        self._sparse = SparseRows(named, self._options.name)
        self._build()

    def has_any(self, ids: Collection[int]) -> bool:
        """Whether a parameter with one of these ids is exchanged here."""
        return any(id(parameter) in ids for parameter in self._named.values())

    def prepare(self) -> None:
        """Before a forward pass: follows parameters that were frozen or unfrozen; handles a batch without a row."""
        if [parameter.requires_grad for parameter in self._named.values()] != self._trained:
            for name, parameter in self._named.items():
                if parameter.requires_grad and name not in self._hooks:
                    self._hooks[name] = self._hook(parameter)
            self._build()
        of_step = part.current()
        if self._held_share is not None and of_step and torch.is_grad_enabled():
            self._keep_shares(of_step)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward within adds to the gradients of this rank alone; the next one outside exchanges them all."""
        self._is_held_back = True
        try:
            yield
        finally:
            self._is_held_back = False

    def before_step(self) -> None:
        """Exchanges if this rank's backward has not: the model was not used here, but maybe on another rank.

        Raises:
            TrainingError: gradients were not summed.
        """
        if [parameter.requires_grad for parameter in self._named.values()] != self._trained:
            raise TrainingError("parameters were frozen or unfrozen within a batch; do it before the batch is drawn")
        if self._held_share is not None:
            raise TrainingError("all backward passes of this step were within no_sync(); leave the last one outside")
        if not self._has_exchanged:
            self._start()
            self._finish()
        self._has_exchanged = False

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The state of this rank's compressors, by name of the state and of the parameter."""
        found: dict[str, dict[str, Tensor]] = {}
        for sync in self._syncs:
            names = sync.names
            for name, tensors in sync.state().items():
                found.setdefault(name, {}).update({names[index]: tensor for index, tensor in tensors.items()})
        return found

    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Gives this rank its part of the sums of all ranks' states."""
        for name, of_parameters in self.state().items():
            for key, tensor in of_parameters.items():
                tensor.copy_(state[name][key] * self._syncs[0].local_state_fraction)

    def _build(self) -> None:
        facts = [[name, parameter.requires_grad, str(parameter.dtype)] for name, parameter in self._named.items()]
        runtime.check_alike({"trained parameters": facts})
        self._trained = [parameter.requires_grad for parameter in self._named.values()]
        old = self.state()
        for sync in self._syncs:
            sync.close()
        by_dtype: dict[torch.dtype, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self._named.items():
            if parameter.requires_grad and name not in self._sparse.named:
                by_dtype.setdefault(parameter.dtype, []).append((name, parameter))
        # Buckets of other parameters must not have the names of the old ones: Horovod remembers their sizes.
        print_of = hashlib.sha256(repr(facts).encode()).hexdigest()[:8]
        self._syncs = [
            AllreduceSync(members, self._topology, self._options.named(f"{self._options.name}.{print_of}.{dtype}"))
            for dtype, members in by_dtype.items()
        ]
        for name, of_parameters in self.state().items():
            for key, tensor in of_parameters.items():
                tensor.copy_(old.get(name, {}).get(key, tensor))

    def _begin(self, _: nn.Parameter) -> None:
        """Hook of each parameter; the first of a backward starts the exchange, or notes that it is held back."""
        if self._is_running:
            return
        self._is_running = True
        Variable._execution_engine.queue_callback(self._finish)
        if not self._is_held_back:
            self._start()

    def _start(self) -> None:
        of_step = part.current()
        share = self._share(of_step)
        self.weight = share * self._counted(of_step)
        for sync in self._syncs:
            sync.prepare_for_backward(self.weight, local_batch_fraction=share, scale=self.weight)

    def _counted(self, of_step: part.Part | None) -> float:
        """The factor on the share of rows that makes it one of targets; see losses.py."""
        number = losses.targets_per_row()
        if number is None or of_step is None or self._is_sum:
            return 1.0
        if not self._targets_per_row:
            (total, count) = runtime.sum_over_ranks(number * of_step.num_rows, of_step.num_rows)
            self._targets_per_row = total / max(count, 1)
        return number / (self._targets_per_row or 1.0)

    def _finish(self) -> None:
        """At the end of a backward."""
        was_begun, self._is_running = self._is_running, False
        share = self._share(part.current())
        for hook in self._zeroing:
            hook.remove()
        self._zeroing = []
        if self._is_held_back and was_begun:
            self._held_share = share
            return
        self._has_exchanged, self._held_share = True, None
        totals = [float(sync.synchronize().loss) for sync in self._syncs]
        for sync, total in zip(self._syncs, totals, strict=True):
            if not self._is_sum and total > 0 and abs(total - 1) > ROUNDING[sync.gradients[0].dtype]:
                torch._foreach_div_(sync.gradients, total)
        self._sparse.gather(self.weight)
        self.weight /= totals[0] if totals and totals[0] > 0 and not self._is_sum else 1.0

    def _keep_shares(self, of_step: part.Part) -> None:
        """Gradients that were held back get the share of the next batch when they are sent: makes up for it."""
        held, share = self._held_share, self._share(of_step)
        gradients = [parameter.grad for parameter in self._named.values() if parameter.grad is not None]
        if held is None or share == held or not gradients:
            return
        if not share:  # the next gradients do not count
            trained = [parameter for parameter in self._named.values() if parameter.requires_grad]
            self._zeroing = [parameter.register_hook(torch.zeros_like) for parameter in trained]
            return
        if held:
            torch._foreach_mul_(gradients, held / share)
        else:
            torch._foreach_zero_(gradients)
        self._held_share = share

    def _share(self, of_step: part.Part | None) -> float:
        if self._zeroing:
            return self._held_share or 0.0
        if self._is_sum:
            return float(not (of_step and of_step.is_empty))
        return of_step.share if of_step else 1 / self._topology.world_size


class SparseRows:
    """Sums sparse gradients of embeddings by gathering the rows of all ranks.

    Args:
        named: the parameters with their names.
        name: begins the names of the messages.

    Attributes:
        named: the parameters.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], name: str) -> None:
        self.named, self._name = dict(named), name

    def gather(self, weight: float) -> None:
        """Gives each parameter the rows of all ranks, those of this rank multiplied by its weight."""
        for name, parameter in self.named.items():
            if parameter.requires_grad:
                rows = self._rows(parameter, weight)
                indices = hvd.allgather(rows.indices().t().contiguous(), name=f"{self._name}.{name}.indices").t()
                values = hvd.allgather(rows.values(), name=f"{self._name}.{name}.values")
                parameter.grad = torch.sparse_coo_tensor(indices, values, parameter.shape) if values.numel() else None

    def _rows(self, parameter: nn.Parameter, weight: float) -> Tensor:
        gradient = parameter.grad
        if gradient is None or not weight:
            no_row = torch.zeros((1, 0), dtype=torch.int64)
            values = parameter.new_zeros((0, *parameter.shape[1:]), requires_grad=False)
            gradient = torch.sparse_coo_tensor(no_row, values, parameter.shape)
        return (gradient * weight).coalesce()

"""Gives a model the gradients of all ranks at the end of each backward."""

import hashlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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
from torch.utils.weak import WeakIdKeyDictionary

# How far the sum of all ranks' weights is from 1 if all targets count.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}


_numbers = itertools.count()
_exchange_of: Any = WeakIdKeyDictionary()  # parameter -> GradientExchange


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
        exchanged_part: this rank's part of the batch of the last exchange.
        num_exchanges: number of exchanges so far.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], topology: Topology, options: SyncOptions, is_sum: bool
    ) -> None:
        self._named, self._topology, self._is_sum = dict(named), topology, is_sum
        self._options = options.named(f"script.{next(_numbers)}")
        self._sparse = SparseRows({}, "")
        self._syncs: list[AllreduceSync] = []
        self._is_running = self._is_held_back = False
        self._is_pending = False  # whether no_sync has kept gradients back
        self.num_exchanges = 0
        self._seen: dict[int, int] = {}  # optimizer -> number of exchanges at its last step
        self._weighing: list[Any] = []  # hooks that weigh gradients when they come, not when they are sent
        self._unit = 1.0  # the sum of the ranks' weights where all targets count
        self._trained: list[bool] = []
        self.weight, self.exchanged_part = 1 / topology.world_size, part.current()
        self._hooks: dict[str, Any] = {}
        others = {id(_exchange_of[each]): _exchange_of[each] for each in self._named.values() if each in _exchange_of}
        for other in others.values():
            other.release(self._named.values())
        for name, parameter in self._named.items():
            _exchange_of[parameter] = self
            if parameter.requires_grad:
                self._hooks[name] = self._hook(parameter)

    def _hook(self, parameter: nn.Parameter) -> Any:
        """Must be registered before the hooks of the buckets."""
        return parameter.register_post_accumulate_grad_hook(self._begin)

    def release(self, parameters: Iterable[nn.Parameter]) -> None:
        """Lets parameters go, which another exchange takes over: their model was prepared again."""
        ids = {id(parameter) for parameter in parameters}
        for name in [name for name, parameter in self._named.items() if id(parameter) in ids]:
            del self._named[name]
            self._sparse.named.pop(name, None)
            if name in self._hooks:
                self._hooks.pop(name).remove()
        self._build()

    def use_sparse(self, parameters: Iterable[Tensor]) -> None:
        """Names the parameters whose gradients are sparse: their rows are gathered."""
        chosen = {id(parameter) for parameter in parameters}
        named = {name: parameter for name, parameter in self._named.items() if id(parameter) in chosen}
        self._sparse = SparseRows(named, self._options.name)
        self._build()

    def has_any(self, ids: Collection[int]) -> bool:
        """Whether a parameter with one of these ids is exchanged here."""
        return any(id(parameter) in ids for parameter in self._named.values())

    def prepare(self) -> None:
        """Before a forward pass: follows parameters that were frozen or unfrozen."""
        if [parameter.requires_grad for parameter in self._named.values()] != self._trained:
            for name, parameter in self._named.items():
                if parameter.requires_grad and name not in self._hooks:
                    self._hooks[name] = self._hook(parameter)
            self._build()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward within adds to the gradients of this rank alone; the next one outside exchanges them all."""
        self._is_held_back = True
        if not self._weighing:
            trained = [parameter for parameter in self._named.values() if parameter.requires_grad]
            self._weighing = [parameter.register_hook(self._weighed) for parameter in trained]
        try:
            yield
        finally:
            self._is_held_back = False

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Exchanges if this rank's backward has not: the model was not used here, but maybe on another rank.

        Raises:
            TrainingError: gradients were not summed.
        """
        if self._is_running:
            raise TrainingError("an optimizer has made its step within backward, before gradients were summed")
        if [parameter.requires_grad for parameter in self._named.values()] != self._trained:
            raise TrainingError("parameters were frozen or unfrozen within a batch; do it before the batch is drawn")
        if self._is_pending:
            raise TrainingError("all backward passes of this step were within no_sync(); leave the last one outside")
        if self._seen.get(id(optimizer), 0) == self.num_exchanges:
            self._start()
            self._finish()
        self._seen[id(optimizer)] = self.num_exchanges

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

    def _begin(self, parameter: nn.Parameter) -> None:
        """Hook of each parameter; the first of a backward starts the exchange, unless it is held back."""
        if self._is_running:
            return
        if parameter.grad is not None and parameter.grad.requires_grad:
            raise TrainingError("backward(create_graph=True): its gradients cannot be summed; use torch.autograd.grad")
        self._is_running = True
        Variable._execution_engine.queue_callback(self._finish)
        if not self._is_held_back:
            if self._is_sum:
                self._check_cleared(parameter)
            self._start()

    def _start(self) -> None:
        self.weight = self.current_weight()
        scale = 1.0 if self._weighing else self.weight
        for sync in self._syncs:
            sync.prepare_for_backward(self.weight, local_batch_fraction=self.weight, scale=scale)

    def current_weight(self) -> float:
        """This rank's weight among the gradients of all ranks."""
        of_step = part.current()
        if self._is_sum:
            return float(not (of_step and of_step.is_empty))
        if of_step is None:
            return 1 / self._topology.world_size
        number = losses.targets_per_row()
        return of_step.share if number is None else of_step.share * number / self._unit

    def _weighed(self, gradient: Tensor) -> Tensor:
        """Hook of each parameter, with no_sync: gradients of batches with other shares are added up."""
        weight = self.current_weight()
        return gradient * weight if weight else torch.zeros_like(gradient)

    def _check_cleared(self, first: nn.Parameter) -> None:
        others = [each.grad for each in self._named.values() if each is not first and each.grad is not None]
        if any(bool(gradient.any()) for gradient in others if not gradient.is_sparse):
            raise TrainingError("losses='sum': gradients are not cleared before backward; accumulate within no_sync()")

    def _finish(self) -> None:
        """At the end of a backward."""
        was_begun, self._is_running = self._is_running, False
        if self._is_held_back and was_begun:
            self._is_pending = True
            if losses.has_partial() and not self._is_sum:
                raise TrainingError("targets that do not count cannot be accumulated within no_sync(); do without it")
            losses.forget()
            return
        has_numbers = part.current() is not None and losses.targets_per_row() is not None
        losses.forget()
        self.num_exchanges, self._is_pending = self.num_exchanges + 1, False
        was_weighed = bool(self._weighing)
        for hook in self._weighing:
            hook.remove()
        self._weighing = []
        self.exchanged_part = part.current()
        totals = [float(sync.synchronize().loss) for sync in self._syncs]
        total = totals[0] if totals and totals[0] > 0 and not self._is_sum else 1.0
        self.weight /= total
        self._sparse.gather(1 / total if was_weighed else self.weight)
        for sync in self._syncs:
            if abs(total - 1) > ROUNDING[sync.gradients[0].dtype]:
                torch._foreach_div_(sync.gradients, total)
        if has_numbers and self._unit == 1.0:
            self._unit = total


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

"""Horovod's start, and the collectives and checks of a PyTorch run."""

import hashlib
import json
import os
import socket
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from common.config.schema import PrecisionConfig
from common.distributed import array_exchange, consensus, launcher_env
from common.distributed.array_exchange import Arrays
from common.distributed.topology import Topology

import horovod.torch as hvd
import numpy as np
import torch
from horovod.common.elastic import notification_manager
from horovod.common.exceptions import HorovodInternalError
from torch import Tensor, nn

_process_sets: dict[tuple[int, ...], hvd.ProcessSet] = {}


class Optimizer(Protocol):
    """The part of the interface of torch.optim.Optimizer that training needs."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Settings, such as lr."""

    @property
    def state(self) -> MutableMapping[Any, dict[str, Any]]:
        """The state of each parameter that is the same on all ranks with the same weights."""

    def step(self) -> Any:
        """Updates the weights once."""


def init(process_sets: Iterable[Sequence[int]] = (), reproducible: bool = False) -> Topology:
    """Starts Horovod if it is not running, and limits this rank's threads and GPUs; without horovodrun: a single rank.

    Args:
        process_sets: the proper subsets of the ranks that will communicate; the same list on all ranks.
        reproducible: operations give the same bits each time, also where other hosts or ranks compute them: with one
            thread, as several cut sums by their number.
    """
    if reproducible:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is then deterministic
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
    if hvd.is_initialized():
        return _topology()
    _process_sets.update((tuple(ranks), hvd.ProcessSet(list(ranks))) for ranks in process_sets)
    launcher_env.set_defaults(bool(_process_sets))
    hvd.init(process_sets=list(_process_sets.values()))
    topology = _topology()
    if topology.world_size == 1:
        launcher_env.refuse_other_launchers()
    if "OMP_NUM_THREADS" not in os.environ and not reproducible:
        torch.set_num_threads(launcher_env.num_threads(topology))
    if torch.cuda.is_available():
        _take_gpu(topology)
    return topology


def _topology() -> Topology:
    return Topology(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size())


def _take_gpu(topology: Topology) -> None:
    """Makes this rank's GPU the current device."""
    torch.cuda.set_device(device(topology))
    of_ranks = allgather_object(f"{socket.gethostname()} {torch.cuda.get_device_properties(device(topology)).uuid}")
    launcher_env.say_who_shares(of_ranks, topology.rank)


def process_set(ranks: Sequence[int]) -> hvd.ProcessSet:
    """The process set of these ranks: all ranks, or a subset that was given to init()."""
    return hvd.global_process_set if len(ranks) == hvd.size() else _process_sets[tuple(ranks)]


def shutdown() -> None:
    """Ends Horovod on all ranks."""
    hvd.shutdown()


def device(topology: Topology) -> torch.device:
    """This rank's GPU if there is one, else the CPU; a process may see all GPUs of its host, or only one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", topology.local_rank % torch.cuda.device_count())


def dtype(cfg: PrecisionConfig) -> torch.dtype:
    """The dtype of weights, activations and gradients."""
    value: torch.dtype = getattr(torch, cfg.dtype.name)
    return value


def seed(number: int, part: int = 0, step: int = 0) -> None:
    """Seeds the random numbers of a step on a part of its batch: a rank's or a lane's; step 0: the initial weights."""
    state = int(np.random.SeedSequence((number, part, step)).generate_state(1)[0])
    torch.default_generator.manual_seed(state)
    if torch.cuda.is_available():  # torch.manual_seed would check for a GPU each time, which takes a millisecond
        torch.cuda.manual_seed(state)


def to_tensor(array: np.ndarray, cfg: PrecisionConfig, where: torch.device) -> Tensor:
    """The array as a tensor on the device, in the run's dtype if it is floating-point."""
    tensor = torch.from_numpy(array)
    return tensor.to(where, dtype(cfg) if tensor.is_floating_point() else tensor.dtype)


def shared_zeros(num_values: int, like: Tensor) -> Tensor:
    """Zeros (num_values,) like a tensor, in memory that the ranks of this host share if it is on the CPU.

    An allreduce of such a tensor copies nothing: each rank sums a part of all ranks' values where they are.
    """
    shared = hvd.shared_memory(num_values * like.element_size()) if like.device.type == "cpu" else None
    return like.new_zeros(num_values) if shared is None else torch.from_numpy(shared).view(like.dtype)


def to_tensors(arrays: Iterable[np.ndarray], cfg: PrecisionConfig, where: torch.device) -> list[Tensor]:
    """The arrays as tensors on the device, floating-point ones in the run's dtype."""
    return [to_tensor(array, cfg, where) for array in arrays]


def allgather_object(value: Any) -> list[Any]:
    """Returns every rank's value, in the order of ranks, on all ranks; values are JSON values."""
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = hvd.allgather(torch.tensor([len(content)]), name="allgather_object.sizes")
    parts = hvd.allgather(content, name="allgather_object.content").split(sizes.tolist())
    return [json.loads(bytes(part.tolist())) for part in parts]


def raise_on_all_ranks() -> AbstractContextManager[None]:
    """If a check fails on one rank in this block, every rank raises its error (common/distributed/consensus.py)."""
    return consensus.raise_on_all_ranks(allgather_object)


def check_alike(facts: Mapping[str, Any]) -> None:
    """Raises a ConfigError on all ranks if they were not started alike (common/training/provenance.py)."""
    consensus.check_alike({**facts, "number of threads": torch.get_num_threads()}, allgather_object)


def broadcast_object(value: Any) -> Any:
    """Returns rank 0's JSON value on all ranks."""
    return allgather_object(value)[0]


def sum_over_ranks(*values: float | Tensor) -> list[float]:
    """The sum of each value over all ranks, computed in float64."""
    return hvd.allreduce(torch.tensor(values, dtype=torch.float64), name="sum_over_ranks", op=hvd.Sum).tolist()


@torch.no_grad()
def broadcast_state(
    model: nn.Module,
    optimizer: Optimizer,
    others: Iterable[Tensor] = (),
    ranks: Sequence[int] | None = None,
) -> None:
    """Broadcasts the first rank's weights, buffers, optimizer state and settings, and others; one message per dtype.

    A rank may have no optimizer state yet: it is created like that of rank 0.

    Args:
        model: the model with the weights and buffers.
        optimizer: the optimizer of the model.
        others: further tensors, with the same shapes on all ranks.
        ranks: a group of ranks whose optimizers have the same structure and settings; only values are sent. None: all
            ranks, and structure and settings are sent, too.
    """
    if ranks is None:
        ranks = range(hvd.size())
        if len(ranks) > 1:
            _take_structure(optimizer)
    if len(ranks) == 1:
        return
    state = [value for values in _states(optimizer) for value in values.values() if isinstance(value, Tensor)]
    weights = [value for value in model.state_dict().values() if isinstance(value, Tensor)]  # others: extra state
    tensors = [*weights, *state, *others]
    for dtype in {tensor.dtype: None for tensor in tensors}:
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in same])
        flat = hvd.broadcast(flat, ranks[0], name=f"state.{dtype}", process_set=process_set(ranks))
        for tensor, part in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _states(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The optimizer's state of each parameter, in the order of its groups."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [optimizer.state.get(parameter, {}) for parameter in parameters]


def _take_structure(optimizer: Optimizer) -> None:
    """Gives the optimizer rank 0's settings, and creates zeros for the state that rank 0 has."""
    settings = [
        {name: value.item() if isinstance(value, Tensor) else value for name, value in group.items()}
        for group in optimizer.param_groups
    ]
    plain = [{name: value for name, value in group.items() if _is_plain(value)} for group in settings]
    states = [
        {
            name: [str(value.dtype).partition(".")[2], value.device.type, list(value.shape)]
            if isinstance(value, Tensor)
            else value
            for name, value in state.items()
        }
        for state in _states(optimizer)
    ]
    plain, states = broadcast_object([plain, states])
    if hvd.rank() == 0:
        return
    for group, of_zero in zip(optimizer.param_groups, plain, strict=True):
        for name, value in of_zero.items():
            group[name] = tuple(value) if isinstance(value, list) else value
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, state in zip(parameters, states, strict=True):
        optimizer.state[parameter] = {name: _room(value, parameter) for name, value in state.items()}


def _is_plain(value: Any) -> bool:
    """Whether a setting is a number, a string, None, or a list or tuple of these; the parameters are not."""
    members = value if isinstance(value, list | tuple) else [value]
    return all(member is None or isinstance(member, bool | int | float | str) for member in members)


def _room(value: Any, parameter: Tensor) -> Any:
    """Zeros for a description of a tensor of rank 0; other values are returned unchanged."""
    if not isinstance(value, list):
        return value
    dtype, device_type, shape = value
    device = parameter.device if device_type == parameter.device.type else torch.device(device_type)
    return torch.zeros(shape, dtype=getattr(torch, dtype), device=device)


def exchange_arrays(outgoing: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
    """Sends named arrays to each rank; returns the arrays received from each rank."""
    return array_exchange.exchange(outgoing, _alltoall, allgather_object)


def _alltoall(contents: Sequence[bytes]) -> list[bytes]:
    sizes = torch.tensor([len(content) for content in contents], dtype=torch.int32)
    values = torch.frombuffer(bytearray(b"".join(contents) or b" "), dtype=torch.uint8)[: int(sizes.sum())]
    received, splits = hvd.alltoall(values, splits=sizes, name="exchange_arrays")
    return [part.numpy().tobytes() for part in received.split(splits.tolist())]


def assert_weights_in_sync(model: nn.Module, groups: Sequence[Sequence[int]] | None = None) -> str:
    """Checks that the weights of all ranks, or of each group, are equal bit by bit; returns a SHA-256 of all groups.

    Raises:
        TrainingError: the weights differ.
    """
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        if isinstance(tensor, Tensor):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return consensus.assert_weights_in_sync_in_groups(
        digest.hexdigest(), groups or [range(hvd.size())], allgather_object
    )


def listen_to_launcher(listener: Any) -> None:
    """Lets an elastic launcher call listener.on_hosts_updated(timestamp, change) when hosts come or go."""
    notification_manager.init()
    notification_manager.register_listener(listener)


def is_lost_rank(error: BaseException) -> bool:
    """Whether the error means that another rank has exited."""
    return isinstance(error, HorovodInternalError) and consensus.is_lost_rank(error)

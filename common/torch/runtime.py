"""Starts and steadies the ranks of a PyTorch run."""

import hashlib
import json
import os
import socket
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from common import agreement, array_exchange, host, provenance
from common.array_exchange import Arrays
from common.config import PrecisionConfig, RunConfig
from common.topology import Topology
from common.torch.optimizers import Optimizer

import horovod.torch as hvd
import numpy as np
import torch
from horovod.common.exceptions import HorovodInternalError
from torch import Tensor, nn

_process_sets: dict[tuple[int, ...], hvd.ProcessSet] = {}


def init(process_sets: Iterable[Sequence[int]] = ()) -> Topology:
    """Starts Horovod, if it has not been, and gives this rank its share of the cores; without horovodrun: one rank.

    Args:
        process_sets: ranks that will exchange something among themselves; the same on all ranks.
    """
    if hvd.is_initialized():
        return _topology()
    _process_sets.update((tuple(ranks), hvd.ProcessSet(list(ranks))) for ranks in process_sets)
    host.set_cycle_time(bool(_process_sets))
    hvd.init(process_sets=list(_process_sets.values()))
    topology = _topology()
    if topology.world_size == 1:
        host.refuse_other_launchers()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(topology.num_threads(host.num_cores()))
    if torch.cuda.is_available():
        _take_gpu(topology)
    return topology


def _topology() -> Topology:
    return Topology(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size())


def _take_gpu(topology: Topology) -> None:
    """Makes this rank's GPU the current one."""
    torch.cuda.set_device(device(topology))
    of_ranks = gather_json(f"{socket.gethostname()} {torch.cuda.get_device_properties(device(topology)).uuid}")
    host.say_who_shares(of_ranks, topology.rank)


def process_set(ranks: Sequence[int]) -> hvd.ProcessSet:
    """All ranks, or some that were named to init()."""
    return hvd.global_process_set if len(ranks) == hvd.size() else _process_sets[tuple(ranks)]


def shutdown() -> None:
    """Ends Horovod on all ranks."""
    hvd.shutdown()


def device(topology: Topology) -> torch.device:
    """The GPU of this rank where there is one, else the CPU; a task may see all GPUs of its host, or its own alone."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", topology.local_rank % torch.cuda.device_count())


def dtype(cfg: PrecisionConfig) -> torch.dtype:
    """The dtype of weights, activations and gradients."""
    value: torch.dtype = getattr(torch, cfg.dtype.name)
    return value


def seed(number: int, topology: Topology, step: int = 0) -> None:
    """Seeds this rank's random numbers from a step on; 0: initial weights, alike on all ranks; later ones: dropout."""
    state = int(np.random.SeedSequence((number, topology.rank if step else 0, step)).generate_state(1)[0])
    torch.default_generator.manual_seed(state)
    if torch.cuda.is_available():  # torch.manual_seed would look for one each time, for a millisecond
        torch.cuda.manual_seed(state)


def to_tensor(array: np.ndarray, cfg: PrecisionConfig, where: torch.device) -> Tensor:
    """The array on the device; in the run's dtype when it is floating-point."""
    tensor = torch.from_numpy(array)
    return tensor.to(where, dtype(cfg) if tensor.is_floating_point() else tensor.dtype)


def to_tensors(arrays: Iterable[np.ndarray], cfg: PrecisionConfig, where: torch.device) -> list[Tensor]:
    """The arrays on the device; floating-point ones in the run's dtype."""
    return [to_tensor(array, cfg, where) for array in arrays]


def gather_json(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks, on all ranks; values are what JSON can hold."""
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = hvd.allgather(torch.tensor([len(content)]), name="gather_json.sizes")
    parts = hvd.allgather(content, name="gather_json.content").split(sizes.tolist())
    return [json.loads(bytes(part.tolist())) for part in parts]


def joint_check() -> AbstractContextManager[None]:
    """A block that all ranks leave without an error, or all with the ConfigErrors of all (common/agreement.py)."""
    return agreement.joint_check(gather_json)


def check_alike(cfg: RunConfig, fingerprint: str) -> None:
    """Raises a ConfigError on all ranks where they were not started alike (common/provenance.py)."""
    agreement.check_alike(provenance.facts(cfg, fingerprint, torch.get_num_threads()), gather_json)


def from_rank_zero(value: Any) -> Any:
    """Rank 0's value on all ranks."""
    return gather_json(value)[0]


def sum_over_ranks(*values: float | Tensor) -> list[float]:
    """The sum of each value over all ranks, in double precision."""
    return hvd.allreduce(torch.tensor(values, dtype=torch.float64), name="sum_over_ranks", op=hvd.Sum).tolist()


@torch.no_grad()
def broadcast_state(
    model: nn.Module,
    optimizer: Optimizer,
    others: Iterable[Tensor] = (),
    ranks: Sequence[int] | None = None,
) -> None:
    """Gives all ranks the first one's weights, buffers, optimizer state, settings and others, a message per dtype.

    A rank may have no optimizer state yet: it gets what rank 0 has.

    Args:
        model: whose weights and buffers they are.
        optimizer: of the model.
        others: tensors that all ranks have, alike in shape.
        ranks: some that have optimizers with the same state and settings already, of which only the values are sent.
    """
    if ranks is None:
        ranks = range(hvd.size())
        if len(ranks) > 1:
            _take_structure(optimizer)
    if len(ranks) == 1:
        return
    state = [value for values in _states(optimizer) for value in values.values() if isinstance(value, Tensor)]
    tensors = [*model.state_dict().values(), *state, *others]
    for dtype in {tensor.dtype: None for tensor in tensors}:
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in same])
        flat = hvd.broadcast(flat, ranks[0], name=f"state.{dtype}", process_set=process_set(ranks))
        for tensor, part in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _states(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What the optimizer keeps of each parameter, in the order of its groups."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [optimizer.state.get(parameter, {}) for parameter in parameters]


def _take_structure(optimizer: Optimizer) -> None:
    """Gives the optimizer rank 0's settings, and room for the state that rank 0 has."""
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
    plain, states = from_rank_zero([plain, states])
    if hvd.rank() == 0:
        return
    for group, of_zero in zip(optimizer.param_groups, plain, strict=True):
        for name, value in of_zero.items():
            group[name] = tuple(value) if isinstance(value, list) else value
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, state in zip(parameters, states, strict=True):
        optimizer.state[parameter] = {name: _room(value, parameter) for name, value in state.items()}


def _is_plain(value: Any) -> bool:
    """Whether a setting is a number, a word, None, or some of them; the parameters are not."""
    members = value if isinstance(value, list | tuple) else [value]
    return all(member is None or isinstance(member, bool | int | float | str) for member in members)


def _room(value: Any, parameter: Tensor) -> Any:
    """A tensor like one of rank 0's, or what is no tensor as it is."""
    if not isinstance(value, list):
        return value
    dtype, device_type, shape = value
    device = parameter.device if device_type == parameter.device.type else torch.device(device_type)
    return torch.zeros(shape, dtype=getattr(torch, dtype), device=device)


def exchange_arrays(outgoing: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
    """Sends named arrays to each rank, by its number; returns those that came from each."""
    return array_exchange.exchange(outgoing, _alltoall, gather_json)


def _alltoall(contents: Sequence[bytes]) -> list[bytes]:
    sizes = torch.tensor([len(content) for content in contents], dtype=torch.int32)
    values = torch.frombuffer(bytearray(b"".join(contents) or b" "), dtype=torch.uint8)[: int(sizes.sum())]
    received, splits = hvd.alltoall(values, splits=sizes, name="exchange_arrays")
    return [part.numpy().tobytes() for part in received.split(splits.tolist())]


def under_way(messages: Sequence[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
    """Those of some messages, each a handle and what is sent, that have not left yet; Horovod lets go of the others."""
    left = [handle for handle, _ in messages if hvd.poll(handle)]
    for handle in left:
        hvd.synchronize(handle)
    return [message for message in messages if message[0] not in left]


def check_in_sync(model: nn.Module, groups: Sequence[Sequence[int]] | None = None) -> str:
    """Compares the weights of all ranks, or of those in each group, bit by bit; returns a SHA-256 of all groups'.

    Raises:
        TrainingError: they differ.
    """
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return agreement.same_in_groups(digest.hexdigest(), groups or [range(hvd.size())], gather_json)


def is_lost_rank(error: BaseException) -> bool:
    """Whether the error says that another rank has left the job."""
    return isinstance(error, HorovodInternalError) and agreement.is_lost_rank(error)

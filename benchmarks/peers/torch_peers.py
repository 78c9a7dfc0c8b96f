"""The torch recipes' work without the recipes: a plain loop, DistributedDataParallel, stock Horovod.

Model, data, order, batch, optimizer, clipping, threads and precision are the recipe's; what differs is who averages.
DistributedDataParallel meets at MASTER_ADDR, this machine unless the environment says otherwise.
"""

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from common.config.schema import RunConfig, TransformerLMConfig
from common.data import datasets
from common.data.datasets.augment import Augmented
from common.data.datasets.examples import Examples
from common.data.sampler import TrainingSampler
from common.distributed.topology import Topology
from common.parallel import model_parts
from common.torch.distributed import runtime
from common.torch.gradients import optimizers
from common.torch.script import loop
from recipes import mnist_cnn_torch, mnist_mlp_torch, transformer_lm_torch

import horovod.torch as hvd
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

RECIPES = {"mnist_mlp": mnist_mlp_torch, "mnist_cnn": mnist_cnn_torch, "transformer_lm": transformer_lm_torch}
PORT = "29541"


def task(name: str, cfg: Any) -> tuple[nn.Module, Examples]:
    """The recipe's model and training examples."""
    recipe: Any = RECIPES[name]
    if isinstance(cfg, TransformerLMConfig):
        corpus = datasets.load_text(cfg.data, cfg.model.context)
        return nn.Sequential(*recipe.build_layers(cfg.model, corpus.tokenizer.vocabulary_size)), corpus.train
    images, _ = datasets.load_images(cfg.data)
    return nn.Sequential(*recipe.build_layers(cfg.model)), Augmented(images, cfg.data, cfg.seed)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, the mean over all targets."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def steps(cfg: RunConfig, examples: Examples, topology: Topology) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's inputs and targets of each step."""
    for step in TrainingSampler.from_config(cfg, len(examples), topology).steps():
        inputs, targets = examples.get_batch(step.examples, step.epoch)
        yield torch.from_numpy(inputs), torch.from_numpy(targets)


def timed(batches: Iterator[tuple[Tensor, Tensor]], step: Callable[[Tensor, Tensor], None]) -> list[float]:
    """Seconds of each step, reading its batch included."""
    seconds: list[float] = []
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return seconds
        step(*batch)
        seconds.append(time.perf_counter() - start)


def plain(name: str, cfg: RunConfig) -> list[float]:
    """A loop that knows nothing of other ranks."""
    topology = runtime.init()
    torch.manual_seed(cfg.seed)
    model, examples = task(name, cfg)
    return _loop(model, model, cfg, examples, topology)


def script(name: str, cfg: RunConfig) -> list[float]:
    """The plain loop, distributed as a script of one's own."""
    run = loop.start(cfg.seed)
    model, examples = task(name, cfg)
    run.prepare(model)
    return _loop(model, model, cfg, examples, runtime.init())


def ddp(name: str, cfg: RunConfig) -> list[float]:
    """PyTorch's DistributedDataParallel over Gloo."""
    topology, model, examples = _joined(name, cfg)
    return _loop(model, DistributedDataParallel(model), cfg, examples, topology)


def ddp_fp16(name: str, cfg: RunConfig) -> list[float]:
    """DistributedDataParallel that sends its gradients in 16 bits."""
    topology, model, examples = _joined(name, cfg)
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return _loop(model, wrapped, cfg, examples, topology)


def ddp_powersgd(name: str, cfg: RunConfig) -> list[float]:
    """DistributedDataParallel that sends factors of rank 4 of its gradients, from the third step on."""
    topology, model, examples = _joined(name, cfg)
    # One bucket: of several, Gloo's threads post the second messages in an order that differs from rank to rank.
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1000)
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
    wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return _loop(model, wrapped, cfg, examples, topology)


def _joined(name: str, cfg: RunConfig) -> tuple[Topology, nn.Module, Examples]:
    topology = runtime.init()
    if not dist.is_initialized():
        meeting_place = f"tcp://{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{PORT}"
        dist.init_process_group("gloo", meeting_place, rank=topology.rank, world_size=topology.world_size)
    torch.manual_seed(cfg.seed)
    return topology, *task(name, cfg)


def _loop(model: nn.Module, wrapped: nn.Module, cfg: RunConfig, examples: Examples, topology: Topology) -> list[float]:
    optimizer = optimizers.build(cfg.optimizer, model)

    def step(inputs: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        mean_loss(wrapped(inputs), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.train.clip_norm)
        optimizer.step()

    return timed(steps(cfg, examples, topology), step)


def stock(name: str, cfg: RunConfig) -> list[float]:
    """hvd.DistributedOptimizer at its defaults; to be launched with HOROVOD_EVENT_DRIVEN=0."""
    topology = runtime.init()
    torch.manual_seed(cfg.seed)
    model, examples = task(name, cfg)
    optimizer = optimizers.build(cfg.optimizer, model)
    if isinstance(optimizer, torch.optim.AdamW):  # Horovod makes one more of its class, from the groups alone
        optimizer = torch.optim.AdamW(optimizer.param_groups)
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())

    def step(inputs: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        mean_loss(model(inputs), targets).backward()
        optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.train.clip_norm)
        with optimizer.skip_synchronize():
            optimizer.step()

    return timed(steps(cfg, examples, topology), step)


def pipelining(name: str, cfg: RunConfig) -> list[float]:
    """torch.distributed.pipelining over Gloo: the recipe's layers in two stages, 1F1B."""
    topology, model, examples = _joined(name, cfg)
    layers = list(model.children())
    ranges = model_parts.cut(cfg.parallel, topology.world_size, *[[_numel(layer) for layer in layers]] * 2)
    part = nn.Sequential(*(layers[number] for number in ranges[topology.rank]))
    stage = PipelineStage(part, topology.rank, topology.world_size, torch.device("cpu"))
    schedule = Schedule1F1B(stage, cfg.parallel.num_micro_batches, mean_loss)
    optimizer = optimizers.build(cfg.optimizer, part)

    def step(inputs: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        if stage.is_first:
            schedule.step(inputs)
        else:
            schedule.step(target=targets)
        gradients = [parameter.grad for parameter in part.parameters() if parameter.grad is not None]
        squares = nn.utils.get_total_norm(gradients) ** 2
        dist.all_reduce(squares)
        nn.utils.clip_grads_with_norm_(part.parameters(), cfg.train.clip_norm, squares.sqrt())
        optimizer.step()

    # All ranks work on the same examples.
    return timed(steps(cfg, examples, Topology(0, 1, 0, 1)), step)


def _numel(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())

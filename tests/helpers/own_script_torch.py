"""A PyTorch loop as its author might have written it, and what docs/your-own-script.md makes of it."""

from collections.abc import Sequence

from common.data import batches
from common.distributed.topology import Topology
from common.torch.data.loop import ShardedBatches
from common.torch.distributed import runtime
from common.torch.gradients.allreduce import AllreduceSync

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

ALONE = Topology(0, 1, 0, 1)
Data = Sequence[tuple[np.ndarray, np.ndarray]]  # training, test
History = dict[str, list[float]]


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    """The same initial weights on every call; GELU has no kink."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 16), nn.GELU(), nn.Linear(16, 10))
    return model, torch.optim.Adam(model.parameters(), 1e-2)


def of_one_rank(data: Data, size: int, epochs: int) -> History:
    """PyTorch alone: nothing of ours but the order of the examples."""
    train, test = (TensorDataset(*map(torch.from_numpy, arrays)) for arrays in data)
    model, optimizer = build()
    history: History = {"loss": [], "val_loss": [], "val_accuracy": []}
    for epoch in range(1, epochs + 1):
        total = 0.0
        order = [part.tolist() for part, _ in batches.of_epoch(len(train), size, ALONE, 1, epoch)]
        for inputs, targets in DataLoader(train, batch_sampler=order):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(inputs)
        with torch.no_grad():
            logits = model(test.tensors[0])
        history["loss"].append(total / len(train))
        history["val_loss"].append(F.cross_entropy(logits, test.tensors[1]).item())
        history["val_accuracy"].append((logits.argmax(-1) == test.tensors[1]).double().mean().item())
    return history


def of_all_ranks(data: Data, size: int, epochs: int, exchange: bool = True) -> History:
    """The same on all ranks; without the exchange the ranks train on their own."""
    topology = runtime.init()
    train, test = (TensorDataset(*map(torch.from_numpy, arrays)) for arrays in data)
    model, optimizer = build()
    with torch.no_grad():
        list(model.parameters())[-1].add_(topology.rank)  # only rank 0's counts
    runtime.broadcast_state(model, optimizer)
    gradients = AllreduceSync(model.parameters(), topology if exchange else ALONE)
    train_batches = ShardedBatches(train, size, topology, seed=1)
    test_batches = ShardedBatches(test, size, topology, shuffle=False)
    history: History = {"loss": [], "val_loss": [], "val_accuracy": []}
    for epoch in range(1, epochs + 1):
        total = 0.0
        for (inputs, targets), global_size in train_batches.epoch(epoch):
            gradients.zero()
            loss = F.cross_entropy(model(inputs), targets, reduction="sum") / global_size
            gradients.prepare_for_backward()
            loss.backward()
            gradients.synchronize()
            optimizer.step()
            total += loss.item() * global_size
        loss_sum = correct = 0.0
        with torch.no_grad():
            for (inputs, targets), _ in test_batches.epoch():
                logits = model(inputs)
                loss_sum += F.cross_entropy(logits, targets, reduction="sum").item()
                correct += (logits.argmax(-1) == targets).sum().item()
        total, loss_sum, correct = runtime.sum_over_ranks(total, loss_sum, correct)
        history["loss"].append(total / len(train))
        history["val_loss"].append(loss_sum / len(test))
        history["val_accuracy"].append(correct / len(test))
    runtime.assert_weights_in_sync(model)
    return history

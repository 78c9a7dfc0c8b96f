"""A training that breaks off within an epoch, and goes on from a checkpoint."""

import os

from horovod_recipes import loop  # new

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

path = f"{os.environ['SCRIPT_FOLDER']}/checkpoint.pt"


def train(break_at):
    run = loop.start(seed=1)  # was: torch.manual_seed(1)
    x, y = torch.rand(90, 8), torch.randint(3, (90,))
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first_epoch = 0
    if os.path.exists(path) and break_at is None:
        state = torch.load(path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        first_epoch = state["epoch"]
    model, optimizer, loader = run.prepare(model, optimizer, loader)  # new
    losses = []
    for epoch in range(first_epoch, 4):
        if epoch == break_at:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
            torch.save(state | {"random": torch.get_rng_state()}, f"{path}.{os.getpid()}")
            os.replace(f"{path}.{os.getpid()}", path)  # never half-written
            return losses, model
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            losses.append(run.mean(loss))  # was: losses.append(loss.item())
    return losses, model


before, _ = train(break_at=2)
after, model = train(break_at=None)
outcome = {"losses": before + after, "weights": [each.detach().numpy() for each in model.parameters()]}

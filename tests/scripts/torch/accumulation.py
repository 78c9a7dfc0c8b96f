"""Gradient accumulation that exchanges once per step, with clipping."""

from contextlib import nullcontext

from horovod_recipes import loop  # new

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

run = loop.start(seed=1)  # was: torch.manual_seed(1)

x, y = torch.rand(89, 8), torch.rand(89, 1)
loader = DataLoader(TensorDataset(x, y), batch_size=11, shuffle=True)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model, optimizer, loader = run.prepare(model, optimizer, loader)  # new
for _ in range(3):
    for number, (inputs, targets) in enumerate(loader, start=1):
        is_last = number % 4 == 0 or number == len(loader)
        with nullcontext() if is_last else run.no_sync():  # was: with nullcontext():
            (F.mse_loss(model(inputs), targets) / 4).backward()
        if is_last:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
outcome = {"weights": [each.detach().numpy() for each in model.parameters()]}

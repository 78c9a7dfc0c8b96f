"""Automatic mixed precision with a scaler, and activation checkpointing."""

from horovod_recipes import loop  # new

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

run = loop.start(seed=1)  # was: torch.manual_seed(1)

x, y = torch.rand(90, 8), torch.randint(3, (90,))
loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
body, head = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU()), nn.Linear(16, 3)
model = nn.ModuleList([body, head])
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
model, optimizer, loader = run.prepare(model, optimizer, loader)  # new
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
losses = []
for _ in range(3):
    for inputs, targets in loader:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = checkpoint(body, inputs, use_reentrant=False)
            loss = F.cross_entropy(head(hidden).float(), targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(run.mean(loss))  # was: losses.append(loss.item())
outcome = {"losses": losses, "weights": [each.detach().numpy() for each in model.parameters()]}

"""A frozen body that is trained later on, a head that is not always used, and a stream of examples."""

from horovod_recipes import loop  # new

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

run = loop.start(seed=1)  # was: torch.manual_seed(1)


class Stream(IterableDataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        yield from zip(self.x, self.y, strict=True)


loader = DataLoader(Stream(torch.rand(70, 8), torch.rand(70, 1)), batch_size=16)
body, heads = nn.Linear(8, 16), nn.ModuleList([nn.Linear(16, 1), nn.Linear(16, 1)])
model = nn.ModuleList([body, heads])
body.requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
model, optimizer, loader = run.prepare(model, optimizer, loader)  # new
losses = []
for epoch in range(4):
    body.requires_grad_(epoch >= 2)
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = F.mse_loss(heads[epoch % 2](torch.tanh(body(inputs))), targets)
        loss.backward()
        optimizer.step()
        losses.append(run.mean(loss))  # was: losses.append(loss.item())
outcome = {"losses": losses, "weights": [each.detach().numpy() for each in model.parameters()]}

"""LBFGS with a closure and a line search, in double precision."""

from horovod_recipes import loop  # new

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

run = loop.start(seed=1)  # was: torch.manual_seed(1)

x = torch.linspace(-3, 3, 101, dtype=torch.float64)[:, None]
loader = DataLoader(TensorDataset(x, torch.sin(x)), batch_size=101)
model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.8, max_iter=5, line_search_fn="strong_wolfe")
model, optimizer, loader = run.prepare(model, optimizer, loader)  # new
losses = []
for _ in range(4):
    for inputs, targets in loader:

        def closure(inputs=inputs, targets=targets):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            return loss

        losses.append(float(optimizer.step(closure)))
outcome = {"losses": losses, "weights": [each.detach().numpy() for each in model.parameters()]}

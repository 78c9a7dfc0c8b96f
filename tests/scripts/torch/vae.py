"""A variational autoencoder whose loss is a sum over the batch."""

from horovod_recipes import loop  # new

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

run = loop.start(seed=1, losses="sum")  # was: torch.manual_seed(1)


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(20, 16), nn.Linear(16, 3), nn.Linear(16, 3)
        self.fc3, self.fc4 = nn.Linear(3, 16), nn.Linear(16, 20)

    def forward(self, x):
        hidden = torch.tanh(self.fc1(x))
        mu, logvar = self.fc21(hidden), self.fc22(hidden)
        std = torch.exp(0.5 * logvar)
        z = mu + torch.randn_like(std) * std
        return torch.sigmoid(self.fc4(torch.tanh(self.fc3(z)))), mu, logvar


def loss_function(recon_x, x, mu, logvar):
    bce = F.binary_cross_entropy(recon_x, x, reduction="sum")
    return bce - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


data = torch.rand(101, 20)
loader = DataLoader(data, batch_size=20, shuffle=True)
model = VAE()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
model, optimizer, loader = run.prepare(model, optimizer, loader)  # new
losses = []
for _ in range(3):
    for x in loader:
        optimizer.zero_grad()
        loss = loss_function(*[model(x)[0], x], *model(x)[1:])
        loss.backward()
        optimizer.step()
        losses.append(run.mean(loss))  # was: losses.append(loss.item())
outcome = {"losses": losses, "weights": [each.detach().numpy() for each in model.parameters()]}

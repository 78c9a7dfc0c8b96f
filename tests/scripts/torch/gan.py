"""A GAN with two models and two optimizers."""

from horovod_recipes import loop  # new

import torch
from torch import nn
from torch.utils.data import DataLoader

run = loop.start(seed=1)  # was: torch.manual_seed(1)

real_data = torch.randn(97, 6) + 2
loader = DataLoader(real_data, batch_size=24, shuffle=True)
generator = nn.Sequential(nn.Linear(4, 16), nn.LeakyReLU(0.2), nn.Linear(16, 6))
discriminator = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
criterion = nn.BCEWithLogitsLoss()
optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999))
optimizer_g = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
*_, loader = run.prepare(generator, discriminator, optimizer_d, optimizer_g, loader)  # new
losses = []
for _ in range(3):
    for real in loader:
        batch_size = real.size(0)
        discriminator.zero_grad()
        error_real = criterion(discriminator(real), torch.ones(batch_size, 1))
        error_real.backward()
        fake = generator(torch.randn(batch_size, 4))
        error_fake = criterion(discriminator(fake.detach()), torch.zeros(batch_size, 1))
        error_fake.backward()
        optimizer_d.step()
        generator.zero_grad()
        error_g = criterion(discriminator(fake), torch.ones(batch_size, 1))
        error_g.backward()
        optimizer_g.step()
        losses.append(run.mean(error_real + error_fake))  # was: losses.append((error_real + error_fake).item())
        losses.append(run.mean(error_g))  # was: losses.append(error_g.item())
weights = [*generator.parameters(), *discriminator.parameters()]
outcome = {"losses": losses, "weights": [each.detach().numpy() for each in weights]}

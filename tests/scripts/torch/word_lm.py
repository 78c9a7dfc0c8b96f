"""A language model with an LSTM: tied weights, dropout, clipping, and a perplexity over all tokens."""

from horovod_recipes import loop  # new

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

run = loop.start(seed=1)  # was: torch.manual_seed(1)


class RNNModel(nn.Module):
    def __init__(self, num_tokens=30, width=12):
        super().__init__()
        self.drop, self.encoder = nn.Dropout(0.2), nn.Embedding(num_tokens, width)
        self.rnn = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.decoder = nn.Linear(width, num_tokens)
        self.decoder.weight = self.encoder.weight

    def forward(self, words):
        output, _ = self.rnn(self.drop(self.encoder(words)))
        return self.decoder(self.drop(output))


text = torch.randint(30, (83, 11))
loader = DataLoader(TensorDataset(text[:, :-1], text[:, 1:]), batch_size=12, shuffle=True)
model = RNNModel()
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
criterion = nn.CrossEntropyLoss()
model, optimizer, loader = run.prepare(model, optimizer, loader)  # new
losses = []
for _ in range(3):
    for words, targets in loader:
        optimizer.zero_grad()
        loss = criterion(model(words).flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        losses.append(run.mean(loss))  # was: losses.append(loss.item())
outcome = {"losses": losses, "weights": [each.detach().numpy() for each in model.parameters()]}

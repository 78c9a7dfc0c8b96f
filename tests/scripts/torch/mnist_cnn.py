"""A convolutional network for digits, with dropout, a schedule, and a test after each epoch."""

from horovod_recipes import loop  # new

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

run = loop.start(seed=1)  # was: torch.manual_seed(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)
        self.dropout1, self.dropout2 = nn.Dropout2d(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(128, 32), nn.Linear(32, 4)

    def forward(self, x):
        x = F.max_pool2d(F.gelu(self.conv2(F.gelu(self.conv1(x)))), 2)
        x = F.gelu(self.fc1(torch.flatten(self.dropout1(x), 1)))
        return F.log_softmax(self.fc2(self.dropout2(x)), dim=1)


images, labels = torch.rand(129, 1, 12, 12), torch.randint(4, (129,))
train_loader = DataLoader(TensorDataset(images[:97], labels[:97]), batch_size=16, shuffle=True)
test_loader = DataLoader(TensorDataset(images[97:], labels[97:]), batch_size=10)
model = Net()
optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
model, optimizer = run.prepare(model, optimizer)  # new
train_loader, test_loader = run.prepare(train_loader, test_loader)  # new
scheduler = StepLR(optimizer, step_size=1, gamma=0.7)
losses, scores = [], []
for _ in range(3):
    model.train()
    for data, target in train_loader:
        optimizer.zero_grad()
        loss = F.nll_loss(model(data), target)
        loss.backward()
        optimizer.step()
        losses.append(run.mean(loss))  # was: losses.append(loss.item())
    model.eval()
    test_loss = correct = 0
    with torch.no_grad():
        for data, target in test_loader:
            output = model(data)
            test_loss += F.nll_loss(output, target, reduction="sum").item()
            correct += output.argmax(dim=1).eq(target).sum().item()
    scores += run.sum(test_loss, correct)  # was: scores += [test_loss, correct]
    scheduler.step()
outcome = {"losses": losses, "scores": scores, "weights": [each.detach().numpy() for each in model.parameters()]}

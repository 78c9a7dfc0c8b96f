"""A bag of words with sparse gradients and two optimizers, from a dict of tensors and a collate function."""

from horovod_recipes import loop  # new

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

run = loop.start(seed=1)  # was: torch.manual_seed(1)

texts = [
    {"words": torch.randint(1, 50, (int(length),)), "label": int(length) % 3} for length in torch.randint(2, 9, (77,))
]


def collate(examples):
    words = nn.utils.rnn.pad_sequence([each["words"] for each in examples], batch_first=True)
    return {"words": words, "label": torch.tensor([each["label"] for each in examples])}


loader = DataLoader(texts, batch_size=10, shuffle=True, collate_fn=collate)
embedding = nn.EmbeddingBag(50, 8, mode="sum", sparse=True, padding_idx=0)
model = nn.Sequential(embedding, nn.Linear(8, 3))
sparse = torch.optim.SparseAdam(embedding.parameters(), lr=0.05)
dense = torch.optim.Adam(model[1].parameters(), lr=0.05)
*_, loader = run.prepare(model, sparse, dense, loader)  # new
losses = []
for _ in range(3):
    for batch in loader:
        model.zero_grad()
        loss = F.cross_entropy(model(batch["words"]), batch["label"])
        loss.backward()
        sparse.step()
        dense.step()
        losses.append(run.mean(loss))  # was: losses.append(loss.item())
outcome = {"losses": losses, "weights": [each.detach().numpy() for each in model.parameters()]}

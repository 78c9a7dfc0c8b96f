"""A GPT-2 of transformers from a configuration, with the model's own loss over unmasked tokens."""

from horovod_recipes import loop  # new

import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

run = loop.start(seed=1)  # was: torch.manual_seed(1)

config = GPT2Config(vocab_size=40, n_positions=12, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
words = torch.randint(40, (50, 12))
lengths = torch.randint(5, 13, (50, 1))
labels = torch.where(torch.arange(12) < lengths, words, -100)
examples = [{"input_ids": word, "labels": label} for word, label in zip(words, labels, strict=True)]
loader = DataLoader(examples, batch_size=7, shuffle=True)
model = GPT2LMHeadModel(config).train()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
model, optimizer, loader = run.prepare(model, optimizer, loader)  # new
for _ in range(3):
    for batch in loader:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
outcome = {"weights": [each.detach().numpy() for each in model.parameters()]}

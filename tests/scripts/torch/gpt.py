"""A small GPT with nanoGPT's loop: parameter groups, warm-up, accumulation, clipping; padding does not count."""

import math

from horovod_recipes import loop  # new

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

run = loop.start(seed=1)  # was: torch.manual_seed(1)


class Block(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x):
        batch, length, width = x.shape
        heads = (batch, length, self.num_heads, width // self.num_heads)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.attention(self.ln_1(x)).split(width, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(y.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, vocabulary=40, length=9, width=16):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.drop, self.blocks = nn.Dropout(0.1), nn.Sequential(Block(width, 2), Block(width, 2))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, words, targets):
        x = self.drop(self.wte(words) + self.wpe(torch.arange(words.shape[1])))
        logits = self.lm_head(self.ln_f(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


text = torch.randint(40, (90, 10))
lengths = torch.randint(4, 11, (90, 1))
targets = torch.where(torch.arange(10) < lengths, text, -1)
loader = DataLoader(list(zip(text[:, :-1], targets[:, 1:], strict=True)), batch_size=11, shuffle=True)
model = GPT()
decayed = [each for each in model.parameters() if each.dim() >= 2]
others = [each for each in model.parameters() if each.dim() < 2]
groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
model, optimizer, loader = run.prepare(model, optimizer, loader)  # new
num_accumulated, iteration = 2, 0
losses = []
for _ in range(3):
    for words, following in loader:
        loss = model(words, following) / num_accumulated
        loss.backward()
        iteration += 1
        if iteration % num_accumulated == 0:
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * min(iteration / 6, 0.5 * (1 + math.cos(math.pi * iteration / 30)))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
outcome = {"weights": [each.detach().numpy() for each in model.parameters()]}

"""The layers of a decoder-only transformer language model.

Vaswani et al., "Attention Is All You Need", 2017, https://arxiv.org/abs/1706.03762, with the norms before the sublayers
and the initial weights of GPT-2: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019,
https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf, and their code,
https://github.com/openai/gpt-2/blob/master/src/model.py.

Shapes: B examples, T tokens, W width, N heads, H = W / N, V vocabulary size, S tokens that are attended to.
"""

from collections.abc import Sequence

from common.config.schema import LMConfig
from common.training.sampling import Window

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-5  # epsilon of the layer norms
DEVIATION = 0.02  # standard deviation of initial weights
POSITION_DEVIATION = 0.01


class KeyValueCache:
    """The keys and values of one layer, for all positions of the context."""

    def __init__(self, num_heads: int, head_width: int, context: int, like: Tensor) -> None:
        self.keys, self.values = like.new_zeros((2, 1, num_heads, context, head_width))

    def extend(self, keys: Tensor, values: Tensor, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """Stores keys and values (1, N, T, H) of T tokens, the first of which is at `position`.

        Returns:
            All keys and values up to the last of these tokens, (1, N, S, H), and the attention mask (T, S) bool.
        """
        end = position + keys.shape[2]
        self.keys[:, :, position:end] = keys
        self.values[:, :, position:end] = values
        places = torch.arange(end, device=keys.device)
        return self.keys[:, :, :end], self.values[:, :, :end], places <= places[position:, None]


class Embedding(nn.Module):
    """Token and learned position embeddings: tokens (B, T) int64 -> (B, T, W)."""

    def __init__(self, vocabulary_size: int, context: int, width: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary_size, width)
        self.position = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.token.weight, std=DEVIATION)
        nn.init.normal_(self.position.weight, std=POSITION_DEVIATION)

    def forward(self, tokens: Tensor, position: int = 0) -> Tensor:
        """Embeds tokens, the first of which is at `position`."""
        positions = self.position.weight[position : position + tokens.shape[1]]  # (T, W)
        return self.dropout(self.token(tokens) + positions)


class Attention(nn.Module):
    """Causal self-attention with several heads: (B, T, W) -> (B, T, W)."""

    def __init__(self, width: int, num_heads: int, num_layers: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = dense(width, 3 * width)
        self.projection = dense(width, width, residual_deviation(num_layers))

    def forward(self, x: Tensor, cache: KeyValueCache | None = None, position: int = 0) -> Tensor:
        """Each token attends to itself and the tokens before it, cached ones included."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, N, H)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, N, T, H) each
        if cache is None:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            key, value, mask = cache.extend(key, value, position)
            mixed = F.scaled_dot_product_attention(query, key, value, mask)
        return self.projection(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a hidden width of 4 W: (B, T, W) -> (B, T, W)."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.hidden = dense(width, 4 * width)
        self.projection = dense(4 * width, width, residual_deviation(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """Applies both layers, with the exact GELU (by the error function) in between."""
        return self.projection(F.gelu(self.hidden(x)))


class Block(nn.Module):
    """Attention and MLP, each with a residual connection: (B, T, W) -> (B, T, W)."""

    def __init__(self, width: int, num_heads: int, dropout: float, num_layers: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, EPSILON)
        self.attention = Attention(width, num_heads, num_layers)
        self.mlp_norm = nn.LayerNorm(width, EPSILON)
        self.mlp = MLP(width, num_layers)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None, position: int = 0) -> Tensor:
        """Applies attention and MLP."""
        x = x + self.dropout(self.attention(self.attention_norm(x), cache, position))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Head(nn.Module):
    """Final norm and logits of the next token: (..., W) -> (..., V).

    Args:
        width: W.
        vocabulary_size: V.
        embedding: its token embedding is used as the weights (Press and Wolf, "Using the Output Embedding to Improve
            Language Models", 2017, https://arxiv.org/abs/1608.05859); None: the head has separate weights.
    """

    def __init__(self, width: int, vocabulary_size: int, embedding: Embedding | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, EPSILON)
        self.projection = dense(width, vocabulary_size, bias=False)
        if embedding is not None:
            self.projection.weight = embedding.token.weight

    def forward(self, x: Tensor) -> Tensor:
        """The logits (..., V)."""
        return self.projection(self.norm(x))


class Decoder:
    """Runs the model token by token, with cached keys and values of earlier tokens.

    Args:
        layers: Embedding, Blocks, Head; they are set to evaluation mode.
        cfg: the model's sizes.
    """

    def __init__(self, layers: Sequence[nn.Module], cfg: LMConfig) -> None:
        self._model = nn.Sequential(*layers).eval()
        weight = next(self._model.parameters())
        self._device = weight.device
        self._caches = [
            KeyValueCache(cfg.num_heads, cfg.width // cfg.num_heads, cfg.context, weight.detach())
            for _ in range(cfg.num_layers)
        ]
        self._window = Window(cfg.context)

    def feed(self, token_ids: np.ndarray) -> np.ndarray:
        """The logits (V,) of the token that follows all tokens so far.

        Args:
            token_ids: (T,) integers, at least one; see Window in common/training/sampling.py for the context.
        """
        tokens, position = self._window.add(token_ids)
        logits = self._forward(torch.from_numpy(tokens)[None].to(self._device), position)
        return logits.cpu().numpy()[0]

    @torch.inference_mode()
    def _forward(self, tokens: Tensor, position: int) -> Tensor:
        """Logits (1, V) after the last of the tokens (1, T)."""
        embedding, *blocks, head = self._model
        x = embedding(tokens, position)
        for block, cache in zip(blocks, self._caches, strict=True):
            x = block(x, cache, position)
        return head(x[:, -1])


def dense(fan_in: int, fan_out: int, deviation: float = DEVIATION, bias: bool = True) -> nn.Linear:
    """A linear layer with normally distributed weights and biases of 0."""
    layer = nn.Linear(fan_in, fan_out, bias)
    nn.init.normal_(layer.weight, std=deviation)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def residual_deviation(num_layers: int) -> float:
    """Standard deviation of initial weights before residual connections: smaller in a model with more layers."""
    return DEVIATION / (2 * num_layers) ** 0.5

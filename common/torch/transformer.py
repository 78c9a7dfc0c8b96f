"""The layers of a decoder-only transformer language model.

Vaswani et al., "Attention Is All You Need", 2017, https://arxiv.org/abs/1706.03762, with the norms before the sublayers
and the initial weights of GPT-2: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019,
https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf, and their code,
https://github.com/openai/gpt-2/blob/master/src/model.py.

Shapes: B examples, T tokens, W width, N heads, H = W / N, V vocabulary, S tokens that are looked back on.
"""

from collections.abc import Mapping, Sequence

from common.config import LMConfig
from common.sampling import Window
from common.torch.checkpoint import load_weights

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-5  # of the norms
DEVIATION = 0.02  # of initial weights
POSITION_DEVIATION = 0.01


class KeyValueCache:
    """Keys and values of one layer, for all positions of the context."""

    def __init__(self, num_heads: int, head_width: int, context: int, like: Tensor) -> None:
        self.keys, self.values = like.new_zeros((2, 1, num_heads, context, head_width))

    def extend(self, keys: Tensor, values: Tensor, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """Takes keys and values (1, N, T, H) of the tokens from a position on.

        Returns:
            All keys and values up to the last of them, (1, N, S, H), and who looks at whom, (T, S) bool.
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
        """Embeds tokens of which the first is at a position."""
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
        """Mixes each token's values with those of the tokens before it, cached ones included."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, N, H)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, N, T, H) each
        if cache is None:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            key, value, mask = cache.extend(key, value, position)
            mixed = F.scaled_dot_product_attention(query, key, value, mask)
        return self.projection(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers, four times as wide in between: (B, T, W) -> (B, T, W)."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.hidden = dense(width, 4 * width)
        self.projection = dense(4 * width, width, residual_deviation(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """The GELU is the exact one, by the error function."""
        return self.projection(F.gelu(self.hidden(x)))


class Block(nn.Module):
    """Attention and MLP, each added to what comes in: (B, T, W) -> (B, T, W)."""

    def __init__(self, width: int, num_heads: int, dropout: float, num_layers: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, EPSILON)
        self.attention = Attention(width, num_heads, num_layers)
        self.mlp_norm = nn.LayerNorm(width, EPSILON)
        self.mlp = MLP(width, num_layers)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None, position: int = 0) -> Tensor:
        """One layer of the transformer."""
        x = x + self.dropout(self.attention(self.attention_norm(x), cache, position))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Head(nn.Module):
    """Final norm and logits of the next token: (..., W) -> (..., V).

    Args:
        width: W.
        vocabulary_size: V.
        embedding: whose token embedding are the weights (Press and Wolf, "Using the Output Embedding to Improve
            Language Models", 2017, https://arxiv.org/abs/1608.05859); None: the head has its own.
    """

    def __init__(self, width: int, vocabulary_size: int, embedding: Embedding | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, EPSILON)
        self.projection = dense(width, vocabulary_size, bias=False)
        if embedding is not None:
            self.projection.weight = embedding.token.weight

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        return self.projection(self.norm(x))


class Decoder:
    """Runs the model token by token; what it has looked at is kept as keys and values.

    Args:
        layers: Embedding, Blocks, Head; they are set to evaluation.
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
        """The logits (V,) of the token that follows all that were fed so far.

        Args:
            token_ids: (T,) integers, at least one; beyond the context common/sampling.py's Window has the rule.
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


def restored_decoder(layers: Sequence[nn.Module], cfg: LMConfig, weights: Mapping[str, np.ndarray]) -> Decoder:
    """A decoder with the weights of a checkpoint, of either framework.

    Raises:
        ConfigError: they are those of another model.
    """
    load_weights(nn.Sequential(*layers), weights)
    return Decoder(layers, cfg)


def dense(fan_in: int, fan_out: int, deviation: float = DEVIATION, bias: bool = True) -> nn.Linear:
    """A linear layer; its weights are normally distributed, its biases 0."""
    layer = nn.Linear(fan_in, fan_out, bias)
    nn.init.normal_(layer.weight, std=deviation)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def residual_deviation(num_layers: int) -> float:
    """Initial weights of layers that are added up along the depth are the smaller, the more of them there are."""
    return DEVIATION / (2 * num_layers) ** 0.5

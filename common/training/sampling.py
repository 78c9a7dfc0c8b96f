"""Samples tokens from a language model's logits, and keeps the window of tokens in its context."""

import numpy as np


def choose(logits: np.ndarray, temperature: float, top_k: int, rng: np.random.Generator) -> int:
    """Draws the next token.

    Args:
        logits: (vocabulary,) unnormalised log-probabilities.
        temperature: divides the logits; 0: takes the most probable token, the first one if several are equal.
        top_k: draws from the top_k most probable tokens (Fan et al., "Hierarchical Neural Story Generation", 2018,
            https://arxiv.org/abs/1805.04833); 0: from all tokens.
        rng: the random number generator.
    """
    if temperature == 0:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64) / temperature
    candidates = np.argsort(-scaled, kind="stable")[: top_k or None]
    weights = np.exp(scaled[candidates] - scaled[candidates[0]])
    return int(rng.choice(candidates, p=weights / weights.sum()))


class Window:
    """The tokens in the context of a model with learned absolute positions.

    Up to `context` tokens are kept. One more token would have no position: then only the last context // 2 tokens, the
    new one included, are kept, and they start again at position 0. So the window depends only on the number of tokens,
    not on how they were split into calls of add().
    """

    def __init__(self, context: int) -> None:
        self._context = context
        self._num_kept = max(1, context // 2)
        self._tokens = np.zeros(0, np.int64)

    def add(self, token_ids: np.ndarray) -> tuple[np.ndarray, int]:
        """Adds tokens (T,), at least one.

        Returns:
            The tokens (S,) int64 that the model has to run, and the position of the first one. If that is 0, the
            model's cache of earlier tokens is invalid.
        """
        position = len(self._tokens)
        self._tokens = np.concatenate([self._tokens, token_ids], dtype=np.int64)
        surplus = len(self._tokens) - self._context
        if surplus > 0:
            num_forgotten = self._context + 1 - self._num_kept  # each time the context is full
            self._tokens = self._tokens[-(-surplus // num_forgotten) * num_forgotten :]
            position = 0
        return self._tokens[position:], position

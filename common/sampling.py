"""How a language model's logits become tokens, and which tokens it looks back on."""

import numpy as np


def choose(logits: np.ndarray, temperature: float, top_k: int, rng: np.random.Generator) -> int:
    """Draws the next token.

    Args:
        logits: (vocabulary,) unnormalised log-probabilities.
        temperature: divides the logits; 0: the most probable token is taken, the first of several.
        top_k: draws from the so many most probable tokens (Fan et al., "Hierarchical Neural Story Generation", 2018,
            https://arxiv.org/abs/1805.04833); 0: from all.
        rng: where the chance comes from.
    """
    if temperature == 0:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64) / temperature
    candidates = np.argsort(-scaled, kind="stable")[: top_k or None]
    weights = np.exp(scaled[candidates] - scaled[candidates[0]])
    return int(rng.choice(candidates, p=weights / weights.sum()))


class Window:
    """The tokens that a model with learned absolute positions looks back on.

    Up to `context` tokens are all seen. The token after them would have no position: all but the last half of the
    context, this token included, is forgotten, what is left starts again at position 0 and grows to the context again.
    So the window depends on the number of tokens alone, not on how they came.
    """

    def __init__(self, context: int) -> None:
        self._context = context
        self._num_kept = max(1, context // 2)
        self._tokens = np.zeros(0, np.int64)

    def add(self, token_ids: np.ndarray) -> tuple[np.ndarray, int]:
        """Adds tokens (T,), at least one.

        Returns:
            The tokens (S,) int64 that the model has to run, and the position of the first; from position 0 on, what it
            ran before is void.
        """
        position = len(self._tokens)
        self._tokens = np.concatenate([self._tokens, token_ids], dtype=np.int64)
        surplus = len(self._tokens) - self._context
        if surplus > 0:
            num_forgotten = self._context + 1 - self._num_kept  # each time
            self._tokens = self._tokens[-(-surplus // num_forgotten) * num_forgotten :]
            position = 0
        return self._tokens[position:], position

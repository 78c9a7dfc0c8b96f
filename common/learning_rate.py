"""The learning rate as a function of the step."""

import math

from common.config import CosineConfig, LRScheduleConfig


def learning_rate(step: int, total_steps: int, peak: float, cfg: LRScheduleConfig) -> float:
    """The learning rate of a step (from 1): linear warm-up to the peak, then constant or half a cosine down.

    The cosine ends with `final_fraction * peak` at `total_steps`. Source: Loshchilov and Hutter, "SGDR: Stochastic
    Gradient Descent with Warm Restarts", 2017, https://arxiv.org/abs/1608.03983 (equation 5, one period); warm-up:
    Goyal et al., "Accurate, Large Minibatch SGD", 2017, https://arxiv.org/abs/1706.02677 (section 2.2).
    """
    if step <= cfg.warmup_steps:
        return peak * step / cfg.warmup_steps
    if not isinstance(cfg, CosineConfig):
        return peak
    progress = (step - cfg.warmup_steps) / (total_steps - cfg.warmup_steps)
    floor = cfg.final_fraction
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)

"""The learning rate as a function of the step."""

import math

from common.batch_size import learning_rate_factor
from common.config import CosineConfig, RunConfig
from common.sharding import Step


def learning_rate(step: Step, cfg: RunConfig) -> float:
    """The learning rate of a step: linear warm-up, constant or half a cosine down, and growth with the batch.

    The cosine falls from optimizer.lr to `final_fraction` of it at the end of the run, and is multiplied by the
    warm-up's step / warmup_steps. Source: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm
    Restarts", 2017, https://arxiv.org/abs/1608.03983 (equation 5, one period); warm-up: Goyal et al., "Accurate, Large
    Minibatch SGD", 2017, https://arxiv.org/abs/1706.02677 (section 2.2); the batch: common/batch_size.py.
    """
    schedule = cfg.lr_schedule
    rate = cfg.optimizer.lr * learning_rate_factor(step.batch_size, cfg.train.global_batch_size, cfg.optimizer)
    if step.number < schedule.warmup_steps:
        rate *= step.number / schedule.warmup_steps
    if isinstance(schedule, CosineConfig):
        floor = schedule.final_fraction
        rate *= floor + (1 - floor) * (1 + math.cos(math.pi * step.progress)) / 2
    return rate

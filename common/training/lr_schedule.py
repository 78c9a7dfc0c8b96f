"""The learning rate as a function of the step."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

from common.config.schema import CosineConfig, LRScheduleConfig, RunConfig
from common.data.batch_schedule import learning_rate_factor
from common.data.sampler import Step

Schedule: TypeAlias = Callable[[Any, float], float]
"""(configuration of the schedule, fraction of the run that is done) -> factor on the peak learning rate."""


def learning_rate(step: Step, cfg: RunConfig) -> float:
    """The learning rate of a step: the schedule, times a linear warm-up, times a factor that grows with the batch size.

    The warm-up's factor is step / warmup_steps. Source: Goyal et al., "Accurate, Large Minibatch SGD", 2017,
    https://arxiv.org/abs/1706.02677 (section 2.2). For the batch's factor, see common/data/batch_schedule.py.
    """
    schedule = cfg.lr_schedule
    rate = cfg.optimizer.lr * learning_rate_factor(step.batch_size, cfg.train.global_batch_size, cfg.optimizer)
    if step.number < schedule.warmup_steps:
        rate *= step.number / schedule.warmup_steps
    _, factor = SCHEDULES[schedule.name]
    return rate * factor(schedule, step.progress)


def _constant(_: LRScheduleConfig, progress: float) -> float:
    return 1.0


def _cosine(cfg: CosineConfig, progress: float) -> float:
    """Falls from 1 to `final_fraction` at the end of the run.

    Source: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017,
    https://arxiv.org/abs/1608.03983 (equation 5, one period)
    """
    return cfg.final_fraction + (1 - cfg.final_fraction) * (1 + math.cos(math.pi * progress)) / 2


# For each name of an option in conf/lr_schedule: the type of its configuration and its function.
SCHEDULES: dict[str, tuple[type[LRScheduleConfig], Schedule]] = {
    "constant": (LRScheduleConfig, _constant),
    "cosine": (CosineConfig, _cosine),
}

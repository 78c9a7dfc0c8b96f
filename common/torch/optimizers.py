"""The optimizers of conf/optimizer as PyTorch has them."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from common.config import AdamWConfig, OptimizerConfig, SGDConfig
from common.step_sums import StepSums

import torch
from torch import nn


class Optimizer(Protocol):
    """What training needs of torch.optim.Optimizer, or of what takes its place."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Settings, such as lr."""

    @property
    def state(self) -> Mapping[Any, dict[str, Any]]:
        """What it keeps for each parameter, and all ranks with the same weights have."""

    def step(self) -> Any:
        """One update of the weights."""


def build(cfg: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the configuration for the model's parameters; only those of two or more dimensions decay."""
    parameters = list(model.parameters())
    return build_for(cfg, [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2])


def build_for(
    cfg: OptimizerConfig, decaying: Sequence[nn.Parameter], others: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer of the configuration for parameters of which some are to decay.

    AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, https://arxiv.org/abs/1711.05101
    """
    optimizer = _build(cfg, decaying, others)
    for parameter in (*decaying, *others):  # from the start, so that a checkpoint or rank 0 has where to put it
        optimizer.state[parameter] = {name: torch.zeros_like(parameter) for name in state_names(optimizer).values()}
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.state[parameter]["step"] = torch.zeros((), device=parameter.device)
    return optimizer


def moments(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the optimizer's state by their names in a checkpoint, such as 1.weight.momentum."""
    named = dict(model.named_parameters())
    by_name = {
        f"{parameter}.{canonical}": optimizer.state[named[parameter]][name]
        for canonical, name in state_names(optimizer).items()
        for parameter in named
    }
    if isinstance(optimizer, torch.optim.AdamW):
        by_name["num_updates"] = optimizer.state[next(iter(named.values()))]["step"]
    return by_name


def set_num_updates(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets the number of updates that AdamW's bias correction counts."""
    for state in optimizer.state.values():
        state["step"].fill_(value)


def state_names(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """A parameter's state: name in a checkpoint -> PyTorch's name."""
    if isinstance(optimizer, torch.optim.AdamW):
        return {"first_moment": "exp_avg", "second_moment": "exp_avg_sq"}
    return {"momentum": "momentum_buffer"} if optimizer.defaults["momentum"] else {}


def _build(
    cfg: OptimizerConfig, decaying: Sequence[nn.Parameter], others: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    if isinstance(cfg, SGDConfig):
        return torch.optim.SGD([*decaying, *others], cfg.lr, cfg.momentum, fused=True)
    if isinstance(cfg, AdamWConfig):
        groups = [{"params": decaying, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, cfg.lr, (cfg.beta1, cfg.beta2), cfg.epsilon, fused=True)
    raise TypeError(f"no optimizer for {type(cfg).__name__}")


def step(optimizer: Optimizer, sums: StepSums) -> None:
    """One update of the weights, unless a rank's gradients overflowed."""
    if not float(sums.overflow):
        optimizer.step()


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Sets the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = value

"""The optimizers of conf/optimizer in PyTorch."""

from collections.abc import Sequence
from typing import Any

from common.config.schema import AdamWConfig, OptimizerConfig, SGDConfig
from common.torch.distributed.runtime import Optimizer

import torch
from torch import nn


class AdamW(torch.optim.AdamW):
    """AdamW whose second moment can be frozen after cfg.freeze_step updates.

    Then the update is linear in the gradients, so that the delayed gradients of error feedback have their full effect;
    the squares of compressed gradients differ from those of the gradients. Source: Tang et al., "1-bit Adam", 2021,
    https://arxiv.org/abs/2102.02888 (algorithm 1)

    Args:
        groups: groups of parameters with their weight_decay.
        cfg: the other settings.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], cfg: AdamWConfig) -> None:
        super().__init__(groups, cfg.lr, (cfg.beta1, cfg.beta2), cfg.epsilon, fused=True)
        self._freeze_step = cfg.freeze_step

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates the weights once."""
        if not self._freeze_step or max(state["step"] for state in self.state.values()) < self._freeze_step:
            super().step()
        else:
            for group in self.param_groups:
                self._step_with_frozen_moment(group)

    @torch.no_grad()
    def _step_with_frozen_moment(self, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        correction = 1 - beta2**self._freeze_step
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            first, second, num_updates = (self.state[parameter][name] for name in ("exp_avg", "exp_avg_sq", "step"))
            num_updates += 1
            first.lerp_(parameter.grad, 1 - beta1)
            # Values without a gradient so far would be divided by 0: for them, the first square is kept.
            torch.where(second > 0, second, correction * parameter.grad**2, out=second)
            root = (second / correction).sqrt_().add_(group["eps"])
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.addcdiv_(first, root, value=-group["lr"] / (1 - beta1 ** float(num_updates)))


def build(cfg: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The configured optimizer for a model; only parameters of two or more dimensions have weight decay."""
    parameters = list(model.parameters())
    return build_for(cfg, parameters, [parameter for parameter in parameters if parameter.ndim < 2])


def build_for(
    cfg: OptimizerConfig, weights: Sequence[nn.Parameter], undecayed: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """The configured optimizer for weights, some of which, the undecayed ones, have no weight decay.

    AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, https://arxiv.org/abs/1711.05101
    """
    without_decay = set(undecayed)
    optimizer = _build(cfg, [weight for weight in weights if weight not in without_decay], undecayed)
    for parameter in weights:  # created now, so that the state of a checkpoint or of rank 0 can be loaded
        optimizer.state[parameter] = {name: torch.zeros_like(parameter) for name in state_names(optimizer).values()}
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.state[parameter]["step"] = torch.zeros((), device=parameter.device)
    return optimizer


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the optimizer's state by name in a checkpoint, such as 1.weight.momentum."""
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
    """Sets the number of updates for AdamW's bias correction."""
    for state in optimizer.state.values():
        state["step"].fill_(value)


def state_names(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """The names of a parameter's state: name in a checkpoint -> PyTorch's name."""
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
        return AdamW(groups, cfg)
    raise TypeError(f"no optimizer for {type(cfg).__name__}")


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Sets the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = value

"""The optimizers of conf/optimizer as PyTorch has them."""

from common.config import AdamWConfig, OptimizerConfig, SGDConfig

import torch
from torch import nn


def build(cfg: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the configuration for the model's parameters.

    AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, https://arxiv.org/abs/1711.05101; only
    parameters of two or more dimensions decay.
    """
    if isinstance(cfg, SGDConfig):
        return torch.optim.SGD(model.parameters(), cfg.lr, cfg.momentum, fused=True)
    if isinstance(cfg, AdamWConfig):
        matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
        others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
        groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, cfg.lr, (cfg.beta1, cfg.beta2), cfg.epsilon, fused=True)
    raise TypeError(f"no optimizer for {type(cfg).__name__}")


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = value

"""The dynamic loss scale of half precision."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.config.schema import LossScalePrecisionConfig, PrecisionConfig


@dataclass(frozen=True)
class LossScale:
    """The rule of the factor on the loss before backward, so that small gradients do not underflow in half precision.

    Micikevicius et al., "Mixed Precision Training", 2018, https://arxiv.org/abs/1710.03740 (section 3.2)

    Attributes:
        initial: the factor at the start, a power of two; 1 without half precision.
        growth_steps: number of steps without an overflow after which the factor doubles; 0: it does not change.
    """

    initial: float = 1.0
    growth_steps: int = 0

    @classmethod
    def from_config(cls, cfg: PrecisionConfig) -> "LossScale":
        """The loss scale of a configuration."""
        is_scaled = isinstance(cfg, LossScalePrecisionConfig)
        return cls(cfg.initial_loss_scale, cfg.growth_steps) if is_scaled else cls()  # type: ignore[attr-defined]

    @property
    def is_dynamic(self) -> bool:
        """Whether the factor changes."""
        return self.growth_steps > 0

    def after_step(
        self, value: Any, good_steps: Any, overflow: Any, where: Callable[[Any, Any, Any], Any]
    ) -> tuple[Any, Any]:
        """The factor and the number of good steps after a step.

        Args:
            value: the factor of the step.
            good_steps: steps since the last overflow or doubling, before this step.
            overflow: whether a loss or gradient of any rank was infinite or NaN.
            where: (condition, value if true, value if false) -> value, as the numbers may be scalars of a graph.
        """
        is_grown = good_steps + 1 >= self.growth_steps
        larger, smaller = where(is_grown, 2 * value, value), where(value > 2, value / 2, 1.0)
        good_steps = where(is_grown, 0.0, good_steps + 1)
        return where(overflow, smaller, larger), where(overflow, 0.0, good_steps)

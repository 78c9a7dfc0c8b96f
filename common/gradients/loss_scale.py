"""The dynamic loss scale of half precision."""

from dataclasses import dataclass

from common.config.schema import LossScalePrecisionConfig, PrecisionConfig


@dataclass
class LossScale:
    """The factor on the loss before backward, so that small gradients do not underflow in half precision.

    Micikevicius et al., "Mixed Precision Training", 2018, https://arxiv.org/abs/1710.03740 (section 3.2)

    Attributes:
        value: a power of two; 1 without half precision.
        growth_steps: number of steps without an overflow after which the value doubles; 0: the value does not grow.
        good_steps: steps since the last overflow or doubling.
        skipped_steps: number of steps skipped so far because a loss or gradient was not finite.
    """

    value: float = 1.0
    growth_steps: int = 0
    good_steps: int = 0
    skipped_steps: int = 0

    @classmethod
    def from_config(cls, cfg: PrecisionConfig) -> "LossScale":
        """The loss scale of a configuration."""
        is_scaled = isinstance(cfg, LossScalePrecisionConfig)
        return cls(cfg.initial_loss_scale, cfg.growth_steps) if is_scaled else cls()  # type: ignore[attr-defined]

    @property
    def is_dynamic(self) -> bool:
        """Whether the scale grows again after steps without an overflow."""
        return self.growth_steps > 0

    def update(self, overflow: bool) -> None:
        """Updates the scale after a step; overflow: whether a loss or gradient of any rank was infinite or NaN."""
        if overflow:
            self.value, self.good_steps = max(1.0, self.value / 2), 0
            self.skipped_steps += 1
            return
        self.good_steps += 1
        if self.is_dynamic and self.good_steps >= self.growth_steps:
            self.value, self.good_steps = 2 * self.value, 0

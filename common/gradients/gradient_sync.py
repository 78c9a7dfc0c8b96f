"""How the gradients of a step are summed over the ranks: options, state, and the order of the work.

Both bindings have the same two siblings behind the protocol GradientSync: AllreduceSync
(common/<framework>/gradients/allreduce.py) and, with parameter servers, WorkerSync and ServerSync
(common/<framework>/parallel/parameter_server.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol

from common.config.composition import option, option_names
from common.config.schema import CompressionConfig, LossyConfig, OnNonfinite, ReduceOp, RunConfig
from common.distributed.topology import Topology
from common.errors import ConfigError
from common.gradients.bucketing import BUCKET_BYTES, Bucket
from common.gradients.compression import local_clip_norm
from common.gradients.loss_scale import LossScale
from common.gradients.step_metrics import StepMetrics

NO_COMPRESSION = CompressionConfig("none")


@dataclass(frozen=True)
class SyncOptions:
    """How gradients are summed over the ranks; the same on all of them.

    Attributes:
        compression: the compression of the gradients.
        op: how the gradients of the ranks are combined.
        loss_scale: the rule of the factor on the losses.
        clip_norm: largest global norm; with error feedback, each rank clips its part before the exchange.
        seed: the seed of the compressors' random numbers.
        measure_noise: also measures the squared norms that the gradient noise scale needs.
        skip_nonfinite: checks for losses and gradients that are not finite and reports them in StepMetrics.overflow.
        bucket_bytes: largest size of a bucket that holds several gradients.
        name: begins the names of all messages; different for each exchange of a process.
    """

    compression: CompressionConfig = field(default_factory=lambda: NO_COMPRESSION)
    op: ReduceOp = ReduceOp.average
    loss_scale: LossScale = LossScale()  # noqa: RUF009 (it is frozen)
    clip_norm: float = 0.0
    seed: int = 0
    measure_noise: bool = False
    skip_nonfinite: bool = False
    bucket_bytes: int = BUCKET_BYTES
    name: str = "gradients"

    @classmethod
    def from_config(cls, cfg: RunConfig) -> "SyncOptions":
        """The options of a run."""
        return cls(
            cfg.compression,
            cfg.op,
            LossScale.from_config(cfg.precision),
            cfg.train.clip_norm,
            cfg.seed,
            cfg.train.measures_noise,
            cfg.train.on_nonfinite is OnNonfinite.skip,
        )

    @classmethod
    def from_names(cls, compression: "str | Mapping[str, Any]", op: str, seed: int) -> "SyncOptions":
        """The options of a script that has no RunConfig.

        Args:
            compression: a method's name (conf/compression/), or its name and values: {"name": "topk", "ratio": 0.01}.
            op: average or adasum.
            seed: the seed of the compressors' random numbers.

        Raises:
            ConfigError: there is no such method or value.
        """
        values = {"name": compression} if isinstance(compression, str) else dict(compression)
        name, methods = values.pop("name", None), option_names("compression", without=("auto",))
        if name not in methods:
            raise ConfigError([f"compression={name!r}: choose from {', '.join(methods)}"])
        if op not in ReduceOp.__members__:
            raise ConfigError([f"op={op!r}: choose from {', '.join(ReduceOp.__members__)}"])
        defaults = option("compression", name)
        known = [field.name for field in fields(defaults) if field.name != "name"]
        if unknown := sorted(set(values) - set(known)):
            raise ConfigError([f"compression={name}, {', '.join(unknown)}: choose from {', '.join(known)}"])
        if values.get("two_level"):
            raise ConfigError(["compression, two_level=True: only recipes have it; use two_level=False"])
        return cls(replace(defaults, **values), ReduceOp[op], seed=seed)

    def named(self, name: str) -> "SyncOptions":
        """The same options with another name."""
        return replace(self, name=name)

    @property
    def has_feedback(self) -> bool:
        """Whether a rank adds its compression error to its next gradients."""
        return isinstance(self.compression, LossyConfig) and self.compression.error_feedback

    @property
    def measures_health(self) -> bool:
        """Whether the error of the compression is measured in each step."""
        return isinstance(self.compression, LossyConfig) and self.compression.health

    @property
    def finds_nonfinite(self) -> bool:
        """Whether losses and gradients are checked for values that are not finite."""
        return self.loss_scale.is_dynamic or self.skip_nonfinite

    def local_clip_norm(self, num_ranks: int) -> float:
        """Largest norm of a rank's part of the gradients, if each part is clipped before the exchange; else 0.

        With error feedback they are: clipping after the exchange would drop gradient that no residual has recorded.
        """
        return local_clip_norm(self.clip_norm, num_ranks) if self.has_feedback else 0.0

    def compresses_at(self, num_steps: float) -> Any:
        """Whether the step after num_steps steps is compressed: compression.start_step."""
        return not isinstance(self.compression, LossyConfig) or num_steps + 1 >= self.compression.start_step

    def local_state_fraction(self, topology: Topology) -> float:
        """The fraction of a summed state that a rank gets: equal for all ranks that compress, 0 for others."""
        if topology.num_servers:
            return 0.0 if topology.is_server else 1 / len(topology.workers)
        if not (isinstance(self.compression, LossyConfig) and self.compression.two_level):
            return 1 / len(topology.group)
        return 1 / len(topology.first_ranks_of_hosts) if topology.local_rank == 0 else 0.0


class Counters(NamedTuple):
    """The state of the steps so far, the same on all ranks: Python's numbers, or scalars of a graph.

    Attributes:
        num_steps: number of steps.
        loss_scale: factor on the losses of the next step.
        good_steps: steps since the loss scale has changed.
        skipped_steps: number of skipped steps.
    """

    num_steps: Any = 0.0
    loss_scale: Any = 1.0
    good_steps: Any = 0.0
    skipped_steps: Any = 0.0

    def after_step(self, rule: LossScale, is_skipped: Any, where: Callable[[Any, Any, Any], Any]) -> "Counters":
        """The counters after another step.

        Args:
            rule: the rule of the loss scale.
            is_skipped: whether a loss or gradient of any rank was not finite.
            where: (condition, value if true, value if false) -> value.
        """
        num_steps, loss_scale, good_steps, skipped_steps = self
        if rule.is_dynamic:
            loss_scale, good_steps = rule.after_step(loss_scale, good_steps, is_skipped, where)
        return Counters(num_steps + 1, loss_scale, good_steps, where(is_skipped, skipped_steps + 1, skipped_steps))

    def restored(self, rule: LossScale) -> "Counters":
        """The counters of a checkpoint in a run with another rule: the loss scale is taken only if it is dynamic."""
        return self if rule.is_dynamic else self._replace(loss_scale=1.0, good_steps=0.0)


class GradientSync(Protocol):
    """Sums the gradients of a step over the ranks, by allreduce or through parameter servers.

    The order of a step: zero(), forward and backward, synchronize(), clip_norm(), and the optimizer's step.
    """

    options: SyncOptions

    @property
    def buckets(self) -> Sequence[Bucket]:
        """The vectors in which gradients are exchanged."""

    @property
    def loss_scale(self) -> Any:
        """The factor on the losses of the next step, ()."""

    @property
    def local_state_fraction(self) -> float:
        """The fraction of a summed state that this rank gets when a checkpoint is loaded."""

    def zero(self) -> None:
        """Starts a step: clears all gradients."""

    def synchronize(self) -> StepMetrics:
        """Waits until all gradients are summed over the ranks; returns the metrics of the step."""

    def clip_norm(self, max_norm: float) -> None:
        """Scales the summed gradients down to a global L2 norm of max_norm if theirs is larger; 0: no clipping."""

    def sync_weights(self) -> None:
        """Returns when this rank has the newest weights, which parameter servers may hold."""

    def gather_state(self) -> None:
        """Before state() is saved: gives this rank what others have of it; all ranks call it."""

    def state(self) -> Mapping[str, Mapping[int, Any]]:
        """The state of this rank's compressors, by name and index of the parameter."""

    def counters(self) -> Counters:
        """The counters of the steps so far, as numbers."""

    def set_counters(self, counters: Counters) -> None:
        """Sets the counters, those of a checkpoint; the loss scale only if it is dynamic."""


class Scaler(Protocol):
    """The loss scale and the counters of a binding (gradients/loss_scaler.py)."""

    @property
    def loss_scale(self) -> Any:
        """The factor on the losses of the next step, ()."""

    @property
    def counters(self) -> Counters:
        """The counters of the steps so far, as numbers or as scalars of a graph."""

    def numbers(self) -> Counters:
        """The counters of the steps so far, as numbers."""

    def count(self, is_skipped: Any) -> None:
        """Counts a step, and updates the loss scale."""

    def restore(self, counters: Counters) -> None:
        """Continues from the counters of a checkpoint."""


class CountedSync:
    """What both siblings behind GradientSync do alike: the loss scale, the counters, and the share of a state."""

    options: SyncOptions
    _topology: Topology
    _scaler: Scaler

    @property
    def loss_scale(self) -> Any:
        """The factor on the losses of the next step, ()."""
        return self._scaler.loss_scale

    @property
    def local_state_fraction(self) -> float:
        """The fraction of a summed state that this rank gets when a checkpoint is loaded."""
        return self.options.local_state_fraction(self._topology)

    def gather_state(self) -> None:
        """Before state() is saved: nothing is to be done, as states that differ between ranks are summed."""

    def counters(self) -> Counters:
        """The counters of the steps so far, as numbers."""
        return self._scaler.numbers()

    def set_counters(self, counters: Counters) -> None:
        """Sets the counters, those of a checkpoint; the loss scale only if it is dynamic."""
        self._scaler.restore(counters)


class Allreduce(CountedSync, ABC):
    """The order in which gradients are summed by allreduce, after backward; the bindings do the work."""

    def synchronize(self) -> StepMetrics:
        """Waits until all gradients are sums over the ranks.

        The sums over the replicas of a stage come first, then those over the stages: weights that stages share, and
        scalars. State that must not see a skipped step (residuals, momentum) changes only when it is known whether
        this step is skipped.

        Returns:
            The metrics of the step, the same on all ranks.
        """
        errors, wire_bytes = self._finish_buckets()
        self._sum_tied_weights()
        loss, stop, local_grad_sqnorm, overflow = self._sum_scalars()
        is_skipped = overflow > 0 if self.options.finds_nonfinite else False
        loss_scale = self._scaler.counters.loss_scale
        self._commit(is_skipped)
        global_grad_sqnorm = self._squared_norm() if self.options.measure_noise else 0.0
        cosine, residual_norm = self._health(errors) if self.options.measures_health else (0.0, 0.0)
        self._apply_momentum(is_skipped)
        self._scaler.count(is_skipped)
        return StepMetrics(
            loss,
            stop,
            local_grad_sqnorm,
            overflow,
            global_grad_sqnorm,
            wire_bytes,
            cosine,
            residual_norm,
            loss_scale,
            self._scaler.counters.skipped_steps,
        )

    @abstractmethod
    def _finish_buckets(self) -> tuple[Any, Sequence[Any]]:
        """Sums the buckets over the replicas; returns this rank's errors and sent bytes, for each bucket."""

    @abstractmethod
    def _sum_tied_weights(self) -> None:
        """Sums the gradients of weights that stages share over all their ranks."""

    @abstractmethod
    def _sum_scalars(self) -> Sequence[Any]:
        """The scalars of the last bucket, summed over the stages: loss, stop, local_grad_sqnorm, overflow."""

    @abstractmethod
    def _commit(self, is_skipped: Any) -> None:
        """Makes the compressors' next state the current one, unless the step is skipped."""

    @abstractmethod
    def _squared_norm(self) -> Any:
        """The squared norm () of the summed gradients of this stage."""

    @abstractmethod
    def _health(self, errors: Any) -> tuple[Any, Any]:
        """The cosine to the true gradient, and the norm of all residuals."""

    @abstractmethod
    def _apply_momentum(self, is_skipped: Any) -> None:
        """With DGC, gives the gradients that are not compressed their momentum."""

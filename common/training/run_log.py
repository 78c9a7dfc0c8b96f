"""The log of a run: config.yaml, metrics.jsonl, summary.json, TensorBoard events and progress lines.

Rank 0 writes all of it into one folder; on the other ranks, the same calls write only their part of the ledger.
"""

import datetime
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from common import file_io
from common.config.schema import (
    BatchSchedule,
    LMConfig,
    LossScalePrecisionConfig,
    LossyConfig,
    OnNonfinite,
    ParameterServerConfig,
    RunConfig,
    to_yaml,
)
from common.data.datasets.examples import Batch, Examples
from common.data.example_log import Ledger
from common.data.prefetch import read_ahead
from common.data.sampler import Step, TrainingSampler
from common.distributed.consensus import Runtime
from common.distributed.topology import Topology
from common.errors import TrainingError
from common.gradients.bucketing import Bucket
from common.gradients.step_metrics import StepMetrics
from common.training import metrics_file, run_lock
from common.training.elastic import membership
from common.training.goodput import goodput
from common.training.progress import Progress
from common.training.step_statistics import StepStatistics
from common.training.tensorboard import ScalarWriter

MOST_SKIPPED = 20  # skipped steps in a row at a loss scale of 1, which cannot become smaller


def new_folder(cfg: RunConfig, recipe: str) -> str:
    """The run's folder: run.dir if it is set, else outputs/<recipe>/<date-time>, to the millisecond.

    An elastic run keeps its folder when its ranks change.
    """
    if cfg.elastic and membership.folder:
        return membership.folder
    now = datetime.datetime.now().isoformat(sep="_", timespec="milliseconds").replace(":", "-")
    return cfg.run.dir or str(Path("outputs", recipe, now))


class RunLog:
    """The log of one training run.

    Args:
        cfg: the configuration, with run.dir set.
        recipe: name of the recipe's module, <task>_<framework>.
        sampler: the sampler of the run's steps.
        runtime: the framework's runtime.

    Raises:
        ConfigError: on all ranks, if rank 0 cannot write into the folder.
    """

    def __init__(self, cfg: RunConfig, recipe: str, sampler: TrainingSampler, runtime: Runtime) -> None:
        self.folder = Path(str(cfg.run.dir))
        self._cfg, self._sampler = cfg, sampler
        self._identity = {"recipe": recipe, "framework": recipe.rpartition("_")[2]}
        self._topology: Topology = sampler.topology
        self._statistics = StepStatistics()
        self._skipped_in_a_row = 0
        self._last: dict[str, float] = {}
        with runtime.raise_on_all_ranks():
            if self._topology.rank == 0:
                self._begin_record(recipe)
        self._last = runtime.broadcast_object(self._last)
        self._ledger = Ledger(self.folder, sampler) if cfg.data.ledger and self._topology.counts_examples else None

    def _begin_record(self, recipe: str) -> None:
        """Writes the configuration, continues the log of an earlier launch, and prints the first lines."""
        sampler, start = self._sampler, self._sampler.start.step
        (self.folder / "config.yaml").write_text(to_yaml(self._cfg))
        events = metrics_file.continue_from(self.folder / "metrics.jsonl", start)
        shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)
        self._tensorboard = ScalarWriter(self.folder / "tensorboard")
        for event in events:
            values = {name: value for name, value in event.items() if name not in metrics_file.NOT_VALUES}
            self._tensorboard.write(event["step"], values)
            self._last |= values
        self._progress = Progress(sampler)
        ranks = "1 rank" if self._topology.world_size == 1 else f"{self._topology.world_size} ranks"
        begin = f", from step {start + 1}" if start else ""
        self._progress.say(
            f"{recipe}: {ranks}, {sampler.num_examples} examples, {sampler.batch_sizes.at(start + 1)} a step{begin}, "
            f"{self.folder}"
        )
        for note in _notes(self._cfg, sampler):
            self._progress.say(f"note: {note}")

    def steps(self, examples: Examples) -> Iterator[tuple[Step, Batch]]:
        """Yields the steps of the run with this rank's examples, which are read ahead; measures each step's time."""
        return self._statistics.timed(read_ahead(self._sampler.steps(), examples))

    def record(self, step: Step, lr: float, metrics: StepMetrics) -> None:
        """Records a finished step; train_loss and lr are logged at the first and at every train.log_every-th step.

        Raises:
            TrainingError: the loss is not finite, or too many steps in a row were skipped.
        """
        if self._ledger:
            self._ledger.add(step)
        self._check_finite(step, metrics)
        values: dict[str, float] = {}
        if self._cfg.train.batch_schedule is not BatchSchedule.constant:
            values["batch_size"] = step.batch_size
        if self._cfg.train.batch_schedule is BatchSchedule.noise_scale:
            values["noise_scale"] = self._sampler.batch_sizes.noise_scale
        values |= self._exchange_values(metrics)
        if step.number == 1 or step.number % self._cfg.train.log_every == 0:
            loss = float(metrics.loss)
            losses = {"train_loss": loss} if math.isfinite(loss) else {}  # the loss of a skipped step may be infinite
            self.log(step, lr=lr, **losses, **values)

    def _check_finite(self, step: Step, metrics: StepMetrics) -> None:
        """Raises a TrainingError, on all ranks, if training cannot go on."""
        is_skipped, remedy = float(metrics.overflow) > 0, "a smaller optimizer.lr may help"
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if is_skipped and float(metrics.loss_scale) <= 1 else 0
        if self._skipped_in_a_row > MOST_SKIPPED:
            what = f"{self._skipped_in_a_row} steps in a row were skipped up to step {step.number}"
            raise TrainingError(f"{what}: losses or gradients are not finite; {remedy}")
        if not is_skipped and not math.isfinite(float(metrics.loss)):
            raise TrainingError(
                f"train_loss is {float(metrics.loss)} at step {step.number}; {remedy}, or train.on_nonfinite=skip "
                "where it is a matter of single examples"
            )

    def _exchange_values(self, metrics: StepMetrics) -> dict[str, float]:
        """The logged values of the gradient exchange; also counts its bytes."""
        sent = [float(num_bytes) for num_bytes in metrics.wire_bytes]
        self._statistics.count_bytes(sent)
        values = {"wire_bytes": sum(sent)}
        if len(sent) > 1:
            values |= {f"wire_bytes.{number}": num_bytes for number, num_bytes in enumerate(sent)}
        if isinstance(self._cfg.precision, LossScalePrecisionConfig):
            values["loss_scale"] = float(metrics.loss_scale)
        if "loss_scale" in values or self._cfg.train.on_nonfinite is OnNonfinite.skip:
            values["skipped_steps"] = int(float(metrics.skipped_steps))
        if isinstance(self._cfg.parallel, ParameterServerConfig):
            values["staleness"] = float(metrics.staleness)
        if isinstance(self._cfg.compression, LossyConfig) and self._cfg.compression.health:
            values["gradient_cosine"] = float(metrics.gradient_cosine)
            values["residual_norm"] = float(metrics.residual_norm)
        return values

    def log(self, step: Step, **values: float) -> None:
        """Logs values at a step; every rank must call it with the same values.

        Raises:
            TrainingError: a value is not finite.
        """
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(f"{name} is {value} at step {step.number}; a smaller optimizer.lr may help")
        self._last |= values
        if self._topology.rank == 0:
            event = {"step": step.number, "epoch": step.epoch, **values, "wall_seconds": self._statistics.wall_seconds}
            metrics_file.append(self.folder / "metrics.jsonl", event)
            self._tensorboard.write(step.number, values)
            self._progress.show(step, self._last)

    def finish(
        self, buckets: Sequence[Bucket], weights_sha256: str, measures: Mapping[str, Any] = MappingProxyType({})
    ) -> dict[str, Any]:
        """Writes summary.json, which marks the run as finished, and returns its contents.

        Args:
            buckets: the gradient buckets.
            weights_sha256: the SHA-256 of the final weights of all stages.
            measures: further measurements.
        """
        topology, model, start = self._topology, self._cfg.model, self._sampler.start.step
        summary = {
            **self._identity,
            "world_size": topology.world_size,
            "num_stages": topology.num_stages,
            "num_replicas": topology.num_replicas,
            "steps": start + self._statistics.num_steps,
            "resumed_from_step": start,
            **self._statistics.summary(model.context if isinstance(model, LMConfig) else 0),
            **self._statistics.bytes_per_step(buckets, len(topology.group)),
            "weights_sha256": weights_sha256,
            **measures,
            "goodput": goodput.summary(),
            **self._last,
            "completed": True,
        }
        if self._topology.rank == 0:
            file_io.replace(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
            if self._cfg.elastic:
                self._progress.say(goodput.text())
            results = "  ".join(f"{name} {value:.4g}" for name, value in self._last.items() if name.startswith("test_"))
            self._progress.say(f"done in {summary['wall_seconds']:.1f} s: {results}  {self.folder}")
            run_lock.let_go(self.folder)
        return summary


def _notes(cfg: RunConfig, sampler: TrainingSampler) -> Iterator[str]:
    """Notes on valid settings that the user may not intend."""
    size, warmup_steps = cfg.train.global_batch_size, cfg.lr_schedule.warmup_steps
    if size > sampler.num_examples:
        yield f"train.global_batch_size={size}: a step takes all {sampler.num_examples} examples, as there are no more"
    if cfg.train.reproducible:
        yield f"train.reproducible=true: {cfg.train.lanes} lanes are computed one by one on one thread per rank; slower"
    if warmup_steps > sampler.most_steps:
        yield (
            f"lr_schedule.warmup_steps={warmup_steps}: the run has {sampler.most_steps} steps, and ends before "
            "optimizer.lr is reached"
        )

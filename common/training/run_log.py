"""The log of a run: config.yaml, metrics.jsonl, summary.json, TensorBoard events and progress lines.

Rank 0 writes all of it into one folder; on the other ranks, the same calls write only their part of the ledger.
"""

import datetime
import json
import math
import shutil
import statistics
import sys
import time
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
from common.gradients.bucketing import Bucket, allreduce_bytes
from common.gradients.step_metrics import StepMetrics
from common.training import run_lock
from common.training.tensorboard import ScalarWriter

_NOT_VALUES = ("step", "epoch", "wall_seconds")  # keys of an event that are not logged values
MOST_SKIPPED = 20  # skipped steps in a row at a loss scale of 1, which cannot become smaller
_CLEAR_LINE = "\r\033[K"  # on a terminal


def new_folder(cfg: RunConfig, recipe: str) -> str:
    """The run's folder: run.dir if it is set, else outputs/<recipe>/<date-time>, to the millisecond."""
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
        self._start = time.perf_counter()
        self._step_seconds: list[float] = []
        self._waiting_seconds: list[float] = []
        self._examples = 0
        self._wire_bytes: list[float] = []  # for each bucket, the sum over all steps
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
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(to_yaml(self._cfg))
        self._tensorboard = self._continue_record()
        self._progress = _Progress(sampler)
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
        batches = read_ahead(self._sampler.steps(), examples)
        while True:
            start = time.perf_counter()
            try:
                step, batch = next(batches)
            except StopIteration:
                return
            waited = time.perf_counter()
            yield step, batch
            self._waiting_seconds.append(waited - start)
            self._step_seconds.append(time.perf_counter() - start)
            self._examples += step.global_size

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
        self._wire_bytes = [a + b for a, b in zip(self._wire_bytes or [0.0] * len(sent), sent, strict=True)]
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
            event = {"step": step.number, "epoch": step.epoch, **values, "wall_seconds": self._wall_seconds()}
            with (self.folder / "metrics.jsonl").open("a") as metrics:
                metrics.write(json.dumps(event) + "\n")
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
        num_replicas = self._topology.num_replicas
        model, num_steps, seconds = self._cfg.model, len(self._step_seconds), sum(self._step_seconds)
        rate = self._examples / seconds if num_steps else None  # a run may be resumed at its very end
        summary = {
            **self._identity,
            "world_size": self._topology.world_size,
            "num_stages": self._topology.num_stages,
            "num_replicas": num_replicas,
            "steps": self._sampler.start.step + num_steps,
            "resumed_from_step": self._sampler.start.step,
            "examples": self._examples,
            "wall_seconds": self._wall_seconds(),
            "examples_per_second": rate,
            **({"tokens_per_second": rate and rate * model.context} if isinstance(model, LMConfig) else {}),
            "step_seconds_median": statistics.median(self._step_seconds) if num_steps else None,
            "data_wait_share": sum(self._waiting_seconds) / seconds if num_steps else None,
            "wire_bytes_per_step": sum(self._wire_bytes) / max(1, num_steps),
            "dense_bytes_per_step": allreduce_bytes(
                4 * sum(bucket.num_values for bucket in buckets), len(self._topology.group)
            ),
            "buckets": [
                {"method": bucket.method, "num_values": bucket.num_values, "wire_bytes_per_step": num_bytes}
                for bucket, num_bytes in zip(buckets, self._bytes_of_buckets(len(buckets)), strict=True)
            ],
            "weights_sha256": weights_sha256,
            **measures,
            **self._last,
            "completed": True,
        }
        if self._topology.rank == 0:
            unfinished = self.folder / "summary.json.unfinished"
            unfinished.write_text(json.dumps(summary, indent=2) + "\n")
            unfinished.rename(self.folder / "summary.json")
            results = "  ".join(f"{name} {value:.4g}" for name, value in self._last.items() if name.startswith("test_"))
            self._progress.say(f"done in {summary['wall_seconds']:.1f} s: {results}  {self.folder}")
            run_lock.let_go(self.folder)
        return summary

    def _bytes_of_buckets(self, num_buckets: int) -> list[float]:
        """For each bucket, the mean number of bytes per step that this rank has sent; 0 with a single rank."""
        return [total / max(1, len(self._step_seconds)) for total in self._wire_bytes or [0.0] * num_buckets]

    def _continue_record(self) -> ScalarWriter:
        """Keeps the events up to the step that the run starts from, in metrics.jsonl and for TensorBoard.

        A metrics.jsonl with invalid lines is renamed; the new one starts with its valid events.
        """
        path, events = self.folder / "metrics.jsonl", list[dict[str, Any]]()
        if self._sampler.start.step and path.exists():
            events, problems = events_of_record(path)
            if problems:
                aside = file_io.unused(path.with_name("metrics.damaged.jsonl"))
                path.rename(aside)
                print(f"{path}: is damaged, and kept as {aside.name}: {problems[0]}", file=sys.stderr, flush=True)
        events = [event for event in events if event["step"] <= self._sampler.start.step]
        path.write_text("".join(json.dumps(event) + "\n" for event in events))
        shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)
        writer = ScalarWriter(self.folder / "tensorboard")
        for event in events:
            values = {name: value for name, value in event.items() if name not in _NOT_VALUES}
            writer.write(event["step"], values)
            self._last |= values
        return writer

    def _wall_seconds(self) -> float:
        return time.perf_counter() - self._start


def events_of_record(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The events in a metrics.jsonl, and the problems of its invalid lines.

    A last line without an end, as a killed run leaves it, is ignored.
    """
    try:
        lines = file_io.read_bytes(path).splitlines(keepends=True)
    except OSError as error:
        return [], [str(error.strerror)]
    events, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            continue
        try:
            event = file_io.parse_json(line)
        except ValueError as error:
            problems.append(f"line {number} is not JSON ({file_io.brief(error)})")
            continue
        if _is_event(event):
            events.append(event)
        else:
            problems.append(f"line {number} is no event of a run")
    return events, problems


def _is_event(event: Any) -> bool:
    """Whether it is a dict with a step and an epoch, whose values are all numbers and whose names are ASCII."""
    return (
        isinstance(event, dict)
        and all(type(event.get(name)) is int and 0 <= event[name] < 2**53 for name in ("step", "epoch"))
        and all(type(value) in (int, float) and abs(value) < 1e300 for value in event.values())
        and all(name.isascii() for name in event)
    )


def _notes(cfg: RunConfig, sampler: TrainingSampler) -> Iterator[str]:
    """Notes on valid settings that the user may not intend."""
    size, warmup_steps = cfg.train.global_batch_size, cfg.lr_schedule.warmup_steps
    if size > sampler.num_examples:
        yield f"train.global_batch_size={size}: a step takes all {sampler.num_examples} examples, as there are no more"
    if warmup_steps > sampler.most_steps:
        yield (
            f"lr_schedule.warmup_steps={warmup_steps}: the run has {sampler.most_steps} steps, and ends before "
            "optimizer.lr is reached"
        )


class _Progress:
    """Progress lines on stdout, at most one per second; on a terminal they overwrite each other."""

    def __init__(self, sampler: TrainingSampler) -> None:
        self._sampler = sampler
        self._terminal = sys.stdout.isatty() and sampler.topology.world_size == 1  # mpirun gives each rank a terminal
        self._start = self._shown_at = time.monotonic()
        self._shown_step = sampler.start.step
        self._is_first = True

    def say(self, text: str) -> None:
        """Writes a line that is not overwritten."""
        sys.stdout.write((_CLEAR_LINE if self._terminal else "") + text + "\n")
        sys.stdout.flush()

    def show(self, step: Step, values: Mapping[str, float]) -> None:
        """Writes the progress of training, at most once per second."""
        now = time.monotonic()
        if not self._is_first and now - self._shown_at < 1:
            return
        done = (step.number - self._shown_step) * step.batch_size
        begun = self._sampler.progress(self._sampler.start)
        left = int((now - self._start) * (1 - step.progress) / (step.progress - begun))
        place = [f"step {step.number}", f"epoch {step.epoch}", f"{100 * step.progress:.0f} %"]
        measured = [f"{name} {value:.4g}" for name, value in values.items() if not name.startswith("wire_bytes")]
        pace = [f"{done / (now - self._shown_at):,.0f} examples/s", f"ETA {left // 60}:{left % 60:02}"]
        self._shown_at, self._shown_step, self._is_first = now, step.number, False
        if self._terminal:
            filled = int(20 * step.progress)
            bar = f"[{'#' * filled}{'.' * (20 - filled)}] "
            columns = shutil.get_terminal_size().columns - 1  # a line that is longer cannot be overwritten
            while measured and len(bar + "  ".join(place + measured + pace)) > columns:
                measured.pop()
            sys.stdout.write(_CLEAR_LINE + (bar + "  ".join(place + measured + pace))[:columns])
            sys.stdout.flush()
        else:
            self.say("  ".join(place + measured + pace))

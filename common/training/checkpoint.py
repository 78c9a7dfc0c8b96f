"""Checkpoints of a run: when they are saved, what a run may resume from, and the state of all stages on rank 0.

common/training/checkpoint_files.py has their files.
"""

import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

from common import file_io
from common.config.schema import RunConfig, leaves, to_dict
from common.data import example_log
from common.data.sampler import SamplerState, Step, TrainingSampler
from common.distributed import launcher_env
from common.distributed.array_exchange import Arrays
from common.distributed.consensus import Runtime
from common.distributed.topology import Topology
from common.errors import ConfigError, Stopped, TrainingError
from common.gradients.step_metrics import StepMetrics
from common.training import checkpoint_files, preemption, provenance, run_lock
from common.training.checkpoint_files import GRADIENTS, MEMORY, Checkpoint
from common.training.elastic import RanksChanged, membership
from common.training.goodput import goodput

import numpy as np

SECONDS_TO_LEAVE = 10.0
Exchange = Callable[[Sequence[Arrays]], Sequence[Arrays]]

# Keys that may change between a checkpoint and the run that resumes from it: the loss curve does not depend on them.
# Changes of the examples by keys of data are found by the fingerprint.
RESUME_MAY_CHANGE = (
    *("resume.", "run.", "parallel.", "optimizer.sharded", "data."),
    *("train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "train.on_nonfinite"),
    *("train.commit_every", "elastic", "chaos"),
)
# What runs did before these keys were there.
ADDED_LATER = {"train.reproducible": False, "train.lanes": 8}
RESUME_MUST_MATCH = ("data.balance", "data.max_shift", "data.max_rotation")


class State(Protocol):
    """A framework's access to the state of the model, its optimizer and its gradients; all ranks call each method."""

    def weights(self) -> Arrays:
        """Copies of the weights by name, on rank 0."""

    def optimizer_state(self) -> Arrays:
        """Copies of the optimizer's state by name, on rank 0."""

    def gradients(self) -> Arrays:
        """The state of compressors and the loss scale by name, on rank 0; rank-local states as sums over the ranks."""

    def load(self, weights: Arrays, optimizer_state: Arrays, gradients: Arrays) -> None:
        """Loads the state that rank 0 has read, on the first rank of each stage."""

    def broadcast(self) -> None:
        """Copies the state from the first rank of each stage to its other ranks; splits sums of rank-local states."""


class Checkpoints:
    """Saves the checkpoints of one run, and restores the run from a checkpoint.

    Args:
        cfg: the configuration, with run.dir set.
        recipe: name of the recipe's module, <task>_<framework>.
        fingerprint: the fingerprint of the training set.
        state: the state of the model and its optimizer.
        runtime: the framework's runtime.
        topology: the place of this rank; rank 0 reads and writes.
        extras: further contents of a checkpoint, such as the tokenizer, as JSON values.
    """

    def __init__(
        self,
        cfg: RunConfig,
        recipe: str,
        fingerprint: str,
        state: State,
        runtime: Runtime,
        topology: Topology,
        extras: Mapping[str, Any] | None = None,
    ) -> None:
        self._cfg, self._state, self._runtime = cfg, state, runtime
        self._rank, self._run_folder = topology.rank, Path(str(cfg.run.dir))
        self._folder = self._run_folder / "checkpoints"
        task, _, framework = recipe.rpartition("_")
        self._identity = {
            "task": task,
            "framework": framework,
            "fingerprint": fingerprint,
            "config": to_dict(cfg),
            "versions": provenance.versions(),
            **(extras or {}),
        }
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._writing: Future[None] | None = None
        self._start = 0  # the step after which this launch begins

    def restore(self) -> dict[str, Any]:
        """Gives all ranks the weights and the optimizer's state: from the checkpoint to resume from, or from rank 0.

        Also locks the run folder, and removes or moves aside its records of steps that the run will repeat.

        Returns:
            The checkpoint's state, or {} if training starts at the beginning.

        Raises:
            ConfigError: there is no such checkpoint, or it does not suit this run, or another job uses the folder.
        """
        try:
            restored = self._restored()
            self._start = restored["position"]["step"] if restored else 0
            with self._runtime.raise_on_all_ranks():
                if self._rank == 0:
                    self._begin(self._start)
        except ConfigError:
            run_lock.let_go(self._run_folder)
            raise
        return restored

    def commit_start(self, sampler: TrainingSampler) -> None:
        """With elastic=true: gives each rank the state of the start in memory, also those that have just joined."""
        if self._cfg.elastic:
            arrays = self._commit(sampler.start, sampler)
            if sampler.progress(sampler.start) >= 1:  # rank 0 was lost with the last checkpoint, or after it
                self._save(sampler.start, arrays, sampler, is_last=True)

    def _commit(self, position: SamplerState, sampler: TrainingSampler) -> tuple[Arrays, Arrays, Arrays]:
        arrays = self._state.weights(), self._state.optimizer_state(), self._state.gradients()
        if self._cfg.elastic:
            membership.commit = Checkpoint(MEMORY, *arrays, self._state_at(position, sampler))
        return arrays

    def _restored(self) -> dict[str, Any]:
        checkpoint = membership.newest(self._runtime, self._rank) if self._cfg.elastic else None
        if self._rank > 0:
            run_lock.let_go(self._run_folder)  # it may have been rank 0
        with self._runtime.raise_on_all_ranks():
            if self._rank == 0:
                if self._run_folder.exists():
                    # Where ranks have changed, the process of the last rank 0 may not have ended yet.
                    run_lock.hold(self._run_folder, launcher_env.job(), SECONDS_TO_LEAVE)
                checkpoint = self._newer_than(checkpoint) if checkpoint else self._suitable()
        restored: dict[str, Any] = self._runtime.broadcast_object(checkpoint.state if checkpoint else {})
        if restored:
            with self._runtime.raise_on_all_ranks():
                self._load(restored, checkpoint)
        self._state.broadcast()
        return restored

    def _begin(self, start: int) -> None:
        """Locks the run folder, and removes or moves aside its records of steps after `start`."""
        file_io.make_folder(self._run_folder)
        run_lock.hold(self._run_folder, launcher_env.job())
        example_log.drop(self._run_folder, start)
        checkpoint_files.set_aside(self._folder, start)

    def save_if_due(self, step: Step, metrics: StepMetrics, sampler: TrainingSampler) -> None:
        """Saves a checkpoint every train.checkpoint_every steps, at the end, and if a rank was asked to stop.

        With elastic=true also commits to memory: then, every train.commit_every steps, and before ranks change.

        Raises:
            ConfigError: a checkpoint could not be written; unless it is the last one, raised at the next checkpoint.
            TrainingError: a value of the weights or the other state is not finite; the last checkpoint is kept.
            Stopped: a rank was asked to stop; the checkpoint is saved.
            RanksChanged: ranks will leave or join; the state is committed.
        """
        train, notices = self._cfg.train, float(metrics.stop)
        is_over = step.progress >= 1
        is_stop, is_change = preemption.is_stop(notices) and not is_over, preemption.is_change(notices) and not is_over
        is_due = is_over or is_stop or _divides(train.checkpoint_every, step.number)
        is_commit = self._cfg.elastic and (is_due or is_change or _divides(train.commit_every, step.number))
        if not is_due and not is_commit:
            return
        with goodput.losing("checkpoint"):
            self._sync_records()
            arrays = self._commit(step.end, sampler)
            goodput.committed(step.number)
            if is_due:
                self._save(step.end, arrays, sampler, is_last=is_over or is_stop)
        if is_stop:
            raise Stopped(
                f"stopped at step {step.number}, as asked by a signal; the same command with "
                f"run.dir={self._cfg.run.dir} goes on from there"
            )
        if is_change:
            raise RanksChanged

    def _sync_records(self) -> None:
        """After a power cut, log and ledger must reach as far as any state from which the run can go on."""
        records = [example_log.path_of(self._run_folder, self._start, self._rank)]
        if self._rank == 0:
            records.append(self._run_folder / "metrics.jsonl")
        with self._runtime.raise_on_all_ranks():
            for path in filter(Path.exists, records):
                file_io.sync_path(path)

    def _save(
        self, position: SamplerState, arrays: tuple[Arrays, Arrays, Arrays], sampler: TrainingSampler, is_last: bool
    ) -> None:
        """Writes a checkpoint in the background; the last one, before it returns."""
        with self._runtime.raise_on_all_ranks():
            if self._rank == 0:
                self._wait()
                check_finite(position.step, *arrays)
                self._writing = self._writer.submit(
                    self._write, position.step, *arrays, self._state_at(position, sampler)
                )
                _unfinished[:] = [*(future for future in _unfinished if not future.done()), self._writing]
                if is_last:
                    self._wait()

    def _state_at(self, position: SamplerState, sampler: TrainingSampler) -> dict[str, Any]:
        return self._identity | {
            "position": dataclasses.asdict(position),
            "batch_sizes": sampler.batch_sizes.to_json(),
            "world_size": sampler.topology.world_size,
        }

    def _write(
        self, step: int, weights: Arrays, optimizer_state: Arrays, gradients: Arrays, state: dict[str, Any]
    ) -> None:
        folder = self._folder / f"step-{step:08}"
        if not folder.exists():
            checkpoint_files.write(folder, weights, optimizer_state, gradients, state)
        for old in checkpoint_files.saved(self._folder)[: -self._cfg.train.keep_checkpoints]:
            shutil.rmtree(old)

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _newer_than(self, commit: Checkpoint) -> Checkpoint:
        """The newest checkpoint, if it is newer than the newest commit of the ranks that are left; or the commit."""
        step = commit.state["position"]["step"]
        if checkpoint_files.last_step(self._folder) <= step:
            return commit
        saved, _ = checkpoint_files.newest(self._run_folder)
        return saved if saved and saved.state["position"]["step"] > step else commit

    def _suitable(self) -> Checkpoint | None:
        """The configured checkpoint, or None; raises a ConfigError if this run cannot resume from it."""
        checkpoint = self._chosen()
        if checkpoint is not None:
            problems = list(self._problems(checkpoint))
            if problems:
                raise ConfigError(problems)
            if checkpoint.state["fingerprint"] != self._identity["fingerprint"]:
                checkpoint.state["position"]["offset"] = 0
        return checkpoint

    def _load(self, state: dict[str, Any], checkpoint: Checkpoint | None) -> None:
        """Loads a checkpoint; only rank 0 has it, the others pass None."""
        same_optimizer = state["config"]["optimizer"]["name"] == self._cfg.optimizer.name
        if checkpoint is None:
            self._state.load({}, {}, {})
        else:
            optimizer_state = checkpoint.optimizer_state if same_optimizer else {}
            self._state.load(checkpoint.weights, optimizer_state, checkpoint.gradients)

    def _chosen(self) -> Checkpoint | None:
        source, own = self._cfg.resume.source, checkpoint_files.saved(self._folder)
        if source not in ("auto", "never"):
            return checkpoint_files.find(Path(source))
        if not own:
            return None
        if source == "never":
            raise ConfigError(
                [f"run.dir={self._cfg.run.dir}: holds checkpoints, which resume=never would lose; use resume=auto or "
                 "another folder"]
            )  # fmt: skip
        checkpoint, problems = checkpoint_files.newest(self._run_folder)
        if checkpoint is None:
            raise ConfigError(
                [*problems, f"run.dir={self._cfg.run.dir}: no checkpoint is left; start in another folder"]
            )
        for problem in problems:
            print(f"{problem}; going on from {checkpoint.folder.name}", file=sys.stderr, flush=True)
        return checkpoint

    def _problems(self, checkpoint: Checkpoint) -> Iterator[str]:
        """The reasons why this run cannot resume from the checkpoint."""
        state, allowed = checkpoint.state, self._cfg.resume.allow_changes
        if state["task"] != self._identity["task"]:
            yield f"{checkpoint.folder}: is a checkpoint of {state['task']}, not of {self._identity['task']}"
            return
        if not _are_counters(checkpoint.gradients.get("counters")):
            yield f"{checkpoint.folder}: {GRADIENTS} does not say how many steps were made; use another checkpoint"
        if state["fingerprint"] != self._identity["fingerprint"] and "data" not in allowed:
            yield f"data: the training examples are not those of {checkpoint.folder}; {_remedy('data')}"
        old, new = dict(leaves(state["config"])), dict(leaves(self._identity["config"]))
        for key in sorted(old.keys() | new.keys()):
            before = old.get(key, ADDED_LATER.get(key))
            is_free = key.startswith(RESUME_MAY_CHANGE) and key not in RESUME_MUST_MATCH
            is_free |= key == "train.lanes" and not self._cfg.train.reproducible
            if not is_free and before != new.get(key) and not _names(allowed, key):
                yield f"{key}={new.get(key)}: is {before} in {checkpoint.folder}; {_remedy(key)}"


_unfinished: list[Future[None]] = []  # and the last one


def finish_writing() -> str:
    """Waits until no checkpoint is being written any more; needed before an exit that skips Python's cleanup.

    Returns:
        Why the last one could not be written; empty if it was.
    """
    wait(_unfinished)
    return next((str(future.exception()) for future in _unfinished[-1:] if future.exception()), "")


def _divides(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _are_counters(counters: np.ndarray | None) -> bool:
    return counters is not None and counters.shape in ((3,), (4,)) and bool(np.isfinite(counters).all())


def check_finite(step: int, *states: Arrays) -> None:
    """Raises a TrainingError if a value that is about to be saved is infinite or NaN."""
    for name, array in (item for arrays in states for item in arrays.items()):
        if not np.isfinite(array).all():
            raise TrainingError(
                f"{name} is not finite after step {step}, and is not saved; the last checkpoint is sound; a smaller "
                "optimizer.lr may help"
            )


def check_names_and_shapes(wanted: Mapping[str, tuple[int, ...]], arrays: Arrays) -> None:
    """Raises a ConfigError if the names or shapes of a checkpoint's arrays are not those of the model."""
    problems = [f"{name} is missing" for name in wanted.keys() - arrays.keys()]
    problems += [f"{name} is not in the model" for name in arrays.keys() - wanted.keys()]
    problems += [
        f"{name} has the shape {arrays[name].shape} instead of {shape}"
        for name, shape in wanted.items()
        if name in arrays and arrays[name].shape != shape
    ]
    if problems:
        raise ConfigError([f"resume: the checkpoint is of another model: {'; '.join(sorted(problems)[:3])}"])


def of_all_stages(arrays: Arrays, topology: Topology, exchange: Exchange) -> Arrays:
    """Gathers the arrays of all stages on rank 0, from the first rank of each stage; all ranks must call it.

    Args:
        arrays: the arrays of this rank's stage; with several stages, used if this is the first rank of the stage.
        topology: the place of this rank.
        exchange: sends arrays to each rank and returns those from each.
    """
    mine = arrays if topology.leads_group else {}
    if topology.num_stages == 1:
        return arrays
    received = exchange([mine, *[{}] * (topology.world_size - 1)])
    return {name: array for of_rank in received for name, array in of_rank.items()}


def of_this_stage(arrays: Arrays, names: Sequence[Sequence[str]], topology: Topology, exchange: Exchange) -> Arrays:
    """Sends rank 0's arrays to the first rank of each stage; returns those of this stage. All ranks must call it.

    Args:
        arrays: all arrays on rank 0; unused on the others if there are several stages.
        names: for each rank, the names of its weights.
        topology: the place of this rank.
        exchange: sends arrays to each rank and returns those from each.
    """
    if topology.num_stages == 1:
        return arrays
    leaders = {ranks[0] for ranks in topology.groups}
    sent = [
        {name: array for name, array in arrays.items() if rank in leaders and _belongs_to(name, of_rank)}
        for rank, of_rank in enumerate(names)
    ]
    return exchange(sent)[0]


def _belongs_to(name: str, weights: Iterable[str]) -> bool:
    """Whether an array of a checkpoint is one of the weights, or a state of one of them, or of no weight at all."""
    return "." not in name or any(name == weight or name.startswith(f"{weight}.") for weight in weights)


def _names(allowed: list[str], key: str) -> bool:
    """Whether resume.allow_changes names the key or its group."""
    return any(key == name or key.startswith(f"{name}.") for name in allowed)


def _remedy(key: str) -> str:
    return f"set it back, or accept another loss curve with resume.allow_changes=[{key}]"

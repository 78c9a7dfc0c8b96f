"""How callbacks act when a model trains on all ranks."""

from collections.abc import Sequence
from typing import Any, Protocol

from common.tf.distributed import runtime

import keras

WRITERS = (
    keras.callbacks.BackupAndRestore,
    keras.callbacks.CSVLogger,
    keras.callbacks.ModelCheckpoint,
    keras.callbacks.RemoteMonitor,
    keras.callbacks.TensorBoard,
)
# Callbacks that do something after a batch, but never end training there.
HARMLESS = (*WRITERS, keras.callbacks.ProgbarLogger, keras.callbacks.History)


class Job(Protocol):
    """What Together needs of a distributed model."""

    def begin_training(self, num_steps: int | None) -> None:
        """Compares the ranks, and gives all rank 0's weights, optimizer states and first epoch."""

    def begin_epoch(self) -> None:
        """The next step is the first one of an epoch."""

    def end_batch(self) -> None:
        """Training may be interrupted here."""

    def end_training(self) -> None:
        """Compares the weights of all ranks."""


class Together(keras.callbacks.Callback):
    """Keeps the ranks together; it must be the last callback."""

    def __init__(self, job: Job, others: Sequence[keras.callbacks.Callback]) -> None:
        super().__init__()
        self._job, self._others = job, others
        self._may_end_in_epoch = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Begins with the same state on all ranks, after other callbacks have restored rank 0's."""
        self._job.begin_training(self.params["steps"])
        watched = [other for other in self._others if not isinstance(other, HARMLESS) and _acts_after_batches(other)]
        self._may_end_in_epoch = any(runtime.allgather_object(bool(watched)))

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Has the first step of each epoch checked."""
        self._job.begin_epoch()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """If a callback ends training within an epoch on one rank, it ends on all."""
        self._job.end_batch()
        if self._may_end_in_epoch:
            self._agree_to_stop()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """If a callback ends training after an epoch on one rank, it ends on all."""
        self._agree_to_stop()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Compares the weights of all ranks."""
        self._job.end_training()

    def _agree_to_stop(self) -> None:
        self.model.stop_training = runtime.sum_over_ranks(float(self.model.stop_training))[0] > 0


def of_rank(given: Any, rank: int) -> list[keras.callbacks.Callback]:
    """The callbacks that a rank runs: those that write files only on rank 0."""
    if isinstance(given, keras.callbacks.CallbackList):
        given = given.callbacks
    several = given if isinstance(given, list | tuple) else [given] if given else []
    return [callback for callback in several if rank == 0 or not isinstance(callback, WRITERS)]


def _acts_after_batches(callback: keras.callbacks.Callback) -> bool:
    plain = keras.callbacks.Callback
    return (
        type(callback).on_train_batch_end is not plain.on_train_batch_end
        or type(callback).on_batch_end is not plain.on_batch_end
    )

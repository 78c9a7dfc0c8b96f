"""Scalars for TensorBoard, written without PyTorch or TensorFlow."""

import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ScalarWriter:
    """Appends scalars to a new event file in the folder."""

    def __init__(self, folder: Path) -> None:
        # EventFileWriter is not used, because it imports TensorFlow if that is installed.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._records = event_pb2.Event, summary_pb2.Summary, RecordWriter
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._write(self._event(wall_time=time.time(), file_version="brain.Event:2"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one value for each tag at the step."""
        scalars = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(self._event(wall_time=time.time(), step=step, summary=self._summary(value=scalars)))

    def _write(self, event: Any) -> None:
        with self._path.open("ab") as file:
            self._records(file).write(event.SerializeToString())

"""Progress lines of training."""

import shutil
import sys
import time
from collections.abc import Mapping

from common.data.sampler import Step, TrainingSampler

_CLEAR_LINE = "\r\033[K"  # on a terminal


class Progress:
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

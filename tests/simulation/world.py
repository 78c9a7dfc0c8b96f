"""Simulated time and processes: tasks take turns in an order that a seed decides."""

import heapq
import itertools
import random
import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

import greenlet

TICK = 0.001  # seconds; the mean time of what a task does between two of its waits


class Violation(Exception):  # noqa: N818, it is what the simulation looks for
    """Something has happened that must never happen."""


class Variables(Protocol):
    """The variables that each simulated process has for itself, although they are one module's."""

    def new(self) -> Any:
        """Their values in a process that starts."""

    def take(self) -> Any:
        """Their values now."""

    def put(self, values: Any) -> None:
        """Sets them."""


class Process:
    """A simulated process.

    Attributes:
        name: for the trace.
        host: where it runs.
        environ: its environment variables.
        handlers: what it does about signals.
        at_exit: what it does before it exits by itself.
        files: those that it has opened, which the kernel closes when it ends.
        runtime: its Horovod.
        status: its exit status; None while it runs.
    """

    def __init__(self, world: "World", name: str, host: str, environ: dict[str, str]) -> None:
        self._world, self.name, self.host, self.environ = world, name, host, environ
        self.handlers: dict[int, Any] = {}
        self.at_exit: list[Callable[[], object]] = []
        self.status: int | None = None
        self.files: list[weakref.ref[Any]] = []
        self.runtime: Any = None
        self.values = world.variables.new()
        self._watchers: list[Callable[[], None]] = []
        self.pending: list[int] = []  # signals that have come and were not handled

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self.status is None

    def watch(self, ended: Callable[[], None]) -> None:
        """Calls a function when the process ends; at once, if it has."""
        if self.is_alive:
            self._watchers.append(ended)
        else:
            ended()

    def end(self, status: int) -> None:
        """Ends the process: none of its tasks goes on."""
        if not self.is_alive:
            return
        self._world.say(f"{self.name} ends with status {status}")
        self.status = status
        self._world.keep_values(self)
        for file in (reference() for reference in self.files):
            if file is not None:
                file.close()
        for ended in self._watchers:
            ended()

    def kill(self) -> None:
        """Ends it as kill -9 does."""
        self.end(-9)

    def leave(self, status: int) -> NoReturn:
        """Ends it from within."""
        self.end(status)
        self._world.wait()
        raise AssertionError("a task of a process that has ended goes on")


class Task:
    """What runs in turn with others: a thread of a process, or of the launcher."""

    def __init__(self, world: "World", body: Callable[[], object], process: Process | None, name: str) -> None:
        self._body, self.process, self.name = body, process, name
        self.is_done, self.turn = False, 0  # the number of the wait that will be ended next
        self._waiting_for_end: list[Task] = []
        self._world = world
        self.greenlet = greenlet.greenlet(self._run, world.hub)

    def _run(self) -> None:
        try:
            self._body()
        finally:
            self.is_done = True
            for task in self._waiting_for_end:
                self._world.wake(task)

    def join(self, timeout: float | None = None) -> None:
        """Waits for the end of the task."""
        deadline = None if timeout is None else self._world.now + timeout
        while not self.is_done and (deadline is None or self._world.now < deadline):
            self._waiting_for_end.append(self._world.current)
            self._world.wait(None if deadline is None else deadline - self._world.now)


class World:
    """All that is simulated.

    Args:
        seed: decides about each delay, and so about the order of all that happens.
        variables: the variables that each process has for itself.

    Attributes:
        now: the simulated time in seconds.
        trace: what has happened, in order.
    """

    def __init__(self, seed: str, variables: Variables) -> None:
        self.now, self.trace, self.variables = 0.0, list[str](), variables
        self._random, self._numbers = random.Random(seed), itertools.count()
        self._turns: list[tuple[float, int, Task, int]] = []
        self._calls: list[tuple[float, int, Callable[[], object]]] = []
        self._outside = variables.take()
        self._installed: Process | None = None
        self.hub = greenlet.getcurrent()
        self.current: Task = Task(self, lambda: None, None, "hub")

    def delay(self, mean: float = TICK) -> float:
        """A random time in seconds; now and then it is long."""
        return self._random.expovariate(1 / mean) * (20 if self._random.random() < 0.01 else 1)

    def say(self, what: str) -> None:
        """Notes an event."""
        self.trace.append(f"{self.now:10.4f}  {what}")

    def start(self, body: Callable[[], object], process: Process | None, name: str = "main") -> Task:
        """Starts a task."""
        task = Task(self, body, process, name)
        self.wake(task)
        return task

    def call_at(self, time: float, what: Callable[[], object]) -> None:
        """Calls a function at a time, between two turns."""
        heapq.heappush(self._calls, (time, next(self._numbers), what))

    def wake(self, task: Task, after: float | None = None) -> None:
        """Ends the wait of a task, after a random delay unless one is given."""
        time = self.now + (self.delay() if after is None else after)
        heapq.heappush(self._turns, (time, next(self._numbers), task, task.turn))

    def wait(self, timeout: float | None = None) -> None:
        """Lets other tasks run until this one is woken, or the time is over."""
        if timeout is not None:
            self.wake(self.current, timeout)
        self.hub.switch()
        self._handle_signals()

    def pause(self, seconds: float | None = None) -> None:
        """Lets other tasks run."""
        self.wake(self.current, seconds)
        self.wait()

    def send_signal(self, process: Process, number: int) -> None:
        """Sends a signal, which the process handles when it runs next."""
        if not process.is_alive:
            return
        self.say(f"{process.name} gets signal {number}")
        process.pending.append(number)
        if process.handlers.get(number, signal.SIG_DFL) == signal.SIG_DFL:
            process.end(-number)

    def _handle_signals(self) -> None:
        process = self.current.process
        while process is not None and process.pending:
            handler = process.handlers.get(process.pending.pop())
            if callable(handler):
                handler(0, None)

    def keep_values(self, process: Process) -> None:
        """Notes the variables of a process that ends."""
        if self._installed is process:
            process.values = self.variables.take()

    def run(self, until: Callable[[], bool], check: Callable[[], None], most_seconds: float) -> None:
        """Runs all tasks until something is so.

        Args:
            until: whether it is the end.
            check: called after each turn; raises a Violation.
            most_seconds: of simulated time.

        Raises:
            Violation: a check has failed, nothing can go on, or it takes too long.
        """
        try:
            while not until():
                if not self._turns and not self._calls:
                    raise Violation("nothing goes on: each task waits for another one")
                if self.now > most_seconds:
                    raise Violation(f"it is not over after {most_seconds:.0f} s")
                self._step()
                check()
        finally:
            self._install(None)

    def _step(self) -> None:
        if self._calls and (not self._turns or self._calls[0][0] <= self._turns[0][0]):
            time, _, what = heapq.heappop(self._calls)
            self.now = max(self.now, time)
            what()
            return
        time, _, task, turn = heapq.heappop(self._turns)
        if task.is_done or task.turn != turn or (task.process and not task.process.is_alive):
            return
        self.now = max(self.now, time)
        task.turn += 1
        self._install(task.process)
        self.current = task
        task.greenlet.switch()

    def _install(self, process: Process | None) -> None:
        """Gives a process its variables."""
        if process is self._installed:
            return
        if self._installed is None:
            self._outside = self.variables.take()
        else:
            self._installed.values = self.variables.take()
        self.variables.put(self._outside if process is None else process.values)
        self._installed = process


_MISSING = object()


@contextmanager
def patched(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Sets attributes of objects, for a time."""
    before = [(owner, name, getattr(owner, name, _MISSING)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)

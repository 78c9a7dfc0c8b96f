"""Locks, conditions, threads and queues of the simulation; those of the standard library run on its locks."""

import threading
import traceback
import types
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from tests.simulation.world import Task, Violation, World


class Lock:
    """A lock that lets other tasks run while it waits."""

    def __init__(self, world: World) -> None:
        self._world, self._is_held = world, False
        self._waiting: list[Task] = []

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Takes the lock; whether it could."""
        deadline = self._world.now + timeout
        while self._is_held:
            left = deadline - self._world.now
            if not blocking or (timeout >= 0 and left <= 0):
                return False
            self._waiting.append(self._world.current)
            self._world.wait(left if timeout >= 0 else None)
        self._is_held = True
        return True

    def release(self) -> None:
        """Gives the lock back."""
        if not self._is_held:
            raise RuntimeError("release of a lock that nobody has")
        self._is_held = False
        for task in self._waiting:
            self._world.wake(task)
        self._waiting.clear()

    def locked(self) -> bool:
        """Whether it is taken."""
        return self._is_held

    __enter__ = acquire

    def __exit__(self, *error: object) -> None:
        self.release()


class Threading:
    """What the code under test finds under the name `threading`.

    Its conditions, events and barriers are the standard library's, over simulated locks.
    """

    BrokenBarrierError = threading.BrokenBarrierError

    def __init__(self, world: World) -> None:
        self._world = world
        values = {**vars(threading), "_allocate_lock": self.Lock, "Lock": self.Lock, "RLock": self.Lock}
        values["_time"] = lambda: world.now
        self.Condition = values["Condition"] = _over(threading.Condition, values)
        self.Event, self.Barrier = _over(threading.Event, values), _over(threading.Barrier, values)

    def Lock(self) -> Lock:  # noqa: N802
        """A new lock."""
        return Lock(self._world)

    def Thread(self, target: Callable[..., object], args: Sequence[Any] = (), **rest: Any) -> "Thread":  # noqa: N802
        """A new thread."""
        return Thread(self._world, lambda: target(*args))


def _over(kind: type, values: dict[str, Any]) -> Any:
    """A class with other global variables."""

    def other(value: Any) -> Any:
        if isinstance(value, property):
            return property(other(value.fget))
        if isinstance(value, types.FunctionType):
            return types.FunctionType(value.__code__, values, value.__name__, value.__defaults__, value.__closure__)
        return value

    members = {name: other(value) for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind.__name__, (), members)


class Thread:
    """A task of the current process."""

    daemon = True

    def __init__(self, world: World, body: Callable[[], object]) -> None:
        self._world, self._body = world, body
        self._task: Task | None = None

    def start(self) -> None:
        """Starts it."""
        self._task = self._world.start(self._run, self._world.current.process, "thread")

    def _run(self) -> None:
        try:
            self._body()
        except Exception as error:
            raise Violation(f"a thread ends: {traceback.format_exc()}") from error

    def join(self, timeout: float | None = None) -> None:
        """Waits for its end."""
        if self._task:
            self._task.join(timeout)

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._task is not None and not self._task.is_done


class Queue:
    """A queue whose readers wait."""

    def __init__(self, world: World) -> None:
        self._world, self._waiting = world, list[Task]()
        self._values: deque[Any] = deque()

    def put(self, value: Any) -> None:
        """Appends a value."""
        self._values.append(value)
        for task in self._waiting:
            self._world.wake(task)
        self._waiting.clear()

    def get(self) -> Any:
        """The first value, when there is one."""
        while not self._values:
            self._waiting.append(self._world.current)
            self._world.wait()
        return self._values.popleft()

    def empty(self) -> bool:
        """Whether there is none."""
        return not self._values


class Future:
    """The result of a function that a thread calls."""

    def __init__(self, thread: Thread) -> None:
        self._thread = thread
        self.value: Any = None
        self.error: BaseException | None = None

    def done(self) -> bool:
        """Whether it is there."""
        return not self._thread.is_alive()

    def exception(self) -> BaseException | None:
        """Waits for it; the error, if there was one."""
        self._thread.join()
        return self.error

    def result(self) -> Any:
        """Waits for it; raises its error."""
        if error := self.exception():
            raise error
        return self.value


class Executor:
    """Calls functions one after the other in a thread."""

    def __init__(self, world: World) -> None:
        self._world, self._last = world, list[Future]()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        """Lets a thread call a function after those before it."""
        before = self._last[-1:]

        def call() -> None:
            for future in before:
                future.exception()
            try:
                future_.value = function(*args)
            except Exception as error:
                future_.error = error

        thread = Thread(self._world, call)
        future_ = Future(thread)
        self._last = [future_]
        thread.start()
        return future_

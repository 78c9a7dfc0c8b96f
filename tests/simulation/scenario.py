"""What happens to a run, drawn from a seed; and what must hold whatever happens."""

import copy
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common.config.composition import compose
from common.config.schema import BatchSchedule, RunConfig
from common.data import example_log, prefetch
from common.distributed import launcher_env
from common.training import (
    checkpoint,
    checkpoint_files,
    command_line,
    elastic,
    goodput,
    metrics_file,
    preemption,
    progress,
    run_lock,
    run_log,
    step_statistics,
)
from tests.simulation import servers
from tests.simulation.disk import Disk
from tests.simulation.launcher import Cluster, elastic_job, plain_job
from tests.simulation.threads import Executor, Queue, Threading
from tests.simulation.training import Recipe
from tests.simulation.world import Process, Violation, World, patched

from horovod.runner.common.util import timeout
from horovod.runner.elastic import discovery, driver, registration

HOSTS = ("a", "b", "c")
MOST_RANKS = 4
MOST_SECONDS = 900.0
MOST_LINES = 60  # of a trace
FAULTS = {
    "kill": "kill -9 of a worker",
    "kill_launcher": "kill -9 of a launcher",
    "host": "power cut of a host",
    "power": "power cut of all hosts",
    "leave": "a host leaves",
    "join": "a host comes back",
    "full": "the disk is full for two seconds",
    "lie": "the disk forgets for two seconds what it says is synchronised",
    "terminate": "SIGTERM to a job",
    "second": "another job is started in the same folder",
}


@dataclass(frozen=True)
class Fault:
    """Something that happens.

    Attributes:
        time: in seconds.
        kind: one of FAULTS.
        number: which of those to which it can happen.
    """

    time: float
    kind: str
    number: int

    def __str__(self) -> str:
        return f"at {self.time:.2f} s: {FAULTS[self.kind]} ({self.number})"


@dataclass(frozen=True)
class Plan:
    """A run, and what happens to it.

    Attributes:
        seed: decides all delays, too.
        is_elastic: whether ranks leave and join, by Horovod's elastic driver; else a failure ends a launch.
        is_lossy: whether gradients are compressed, with residuals.
        num_examples: size of the training set.
        options: keys of train.
        slots: number of ranks for each host.
        faults: in the order of their times.
    """

    seed: int
    is_elastic: bool
    is_lossy: bool
    num_examples: int
    options: dict[str, Any]
    slots: dict[str, int]
    faults: tuple[Fault, ...]


def drawn(seed: int) -> Plan:
    """The plan of a seed."""
    draw = random.Random(f"plan {seed}")
    is_elastic = draw.random() < 0.6
    options: dict[str, Any] = {
        "max_steps": draw.randint(12, 30),
        "global_batch_size": draw.randint(MOST_RANKS, 9),
        "checkpoint_every": draw.choice([2, 3, 5, 7]),
        "commit_every": draw.choice([1, 2, 4, 6]),
        "keep_checkpoints": draw.choice([1, 2, 3]),
    }
    if draw.random() < 0.5:
        options |= {"batch_schedule": BatchSchedule.steps, "batch_growth_steps": [draw.randint(3, 15)]}
    slots = {host: draw.choice([1, 1, 2]) for host in HOSTS[: draw.randint(2, 3)]}
    kinds = [kind for kind in FAULTS if is_elastic or kind not in ("leave", "join")]
    faults = [
        Fault(draw.uniform(0.5, 12), draw.choice([*kinds, "kill", "power"]), draw.randrange(1000))
        for _ in range(draw.randint(1, 5))
    ]
    faults.sort(key=lambda fault: fault.time)
    return Plan(seed, is_elastic, draw.random() < 0.4, draw.randint(23, 60), options, slots, tuple(faults))


class _Variables:
    """The variables of common/ that each process has for itself."""

    def new(self) -> Any:
        return elastic.Membership().__dict__, goodput.Goodput().__dict__, (False, False), {}, []

    def take(self) -> Any:
        signals = preemption._requested, preemption._is_change_announced
        objects = elastic.membership.__dict__, goodput.goodput.__dict__
        return (*map(dict, objects), signals, run_lock._held, checkpoint._unfinished)

    def put(self, values: Any) -> None:
        of_membership, of_goodput, signals, run_lock._held, checkpoint._unfinished = values
        for target, attributes in ((elastic.membership, of_membership), (goodput.goodput, of_goodput)):
            target.__dict__.clear()
            target.__dict__.update(attributes)
        preemption._requested, preemption._is_change_announced = signals


class Simulation:
    """One plan, carried out.

    Args:
        plan: what happens.
        root: an empty folder.

    Attributes:
        world: what has happened.
    """

    def __init__(self, plan: Plan, root: Path) -> None:
        self._plan = plan
        self.world = World(f"delays {plan.seed}", _Variables())
        self._disk = Disk(self.world, root, f"disk {plan.seed}")
        self._folder = root / "run"
        self._cfg = _configured(plan, str(self._folder))
        self._recipe = Recipe(self.world, self._cfg, plan.num_examples, plan.is_lossy)
        self._cluster = Cluster(self.world, dict(plan.slots), self._main)
        self._launchers: list[Process] = []
        self._num_users, self._num_launches, self._saved = 0, 0, 0
        self._is_trusted = True  # the disk has done what it said

    def run(self) -> None:
        """Raises a Violation if something happens that must not."""
        with patched(*self._changes()):
            for fault in self._plan.faults:
                self.world.call_at(fault.time, partial(self._happen, fault))
            calm = max((fault.time for fault in self._plan.faults), default=0) + 1
            self.world.call_at(calm, lambda: self._cluster.slots.update(self._plan.slots))
            self._begin_user()
            self.world.run(lambda: self._num_users == 0, self._check, MOST_SECONDS)
        self._check_end()

    def _begin_user(self) -> None:
        """Somebody who starts the job again until it succeeds."""
        self._num_users += 1

        def use() -> None:
            while self._launched() != 0 and not (self._folder / "summary.json").exists():
                self.world.pause(1 + self.world.delay(1))
                if not self._is_trusted and not any(launcher.is_alive for launcher in self._launchers):
                    self._begin_anew()
            self._num_users -= 1

        self.world.start(use, None, "user")

    def _begin_anew(self) -> None:
        """Where a disk has lost all checkpoints, the run refuses to start, and has to be removed."""
        if checkpoint_files.saved(self._folder / "checkpoints") and not checkpoint_files.newest(self._folder)[0]:
            self.world.say("the run is removed")
            self._disk.remove(self._folder.name)

    def _launched(self) -> int:
        """The status of a launch."""
        self._num_launches += 1
        if self._num_launches > 3 * len(self._plan.faults) + 6:
            raise Violation(f"{self._num_launches - 1} launches did not finish the run")
        hosts = [host for host, slots in self._cluster.slots.items() for _ in range(slots)]
        if self._plan.is_elastic:
            launcher = self._cluster.launch(
                lambda process: elastic_job(self._cluster, 1, MOST_RANKS, process), "launcher"
            )
        else:
            placed = hosts[: 1 + self._num_launches % min(MOST_RANKS, len(hosts))]
            launcher = self._cluster.launch(lambda process: plain_job(self._cluster, placed, process), "launcher")
        self._launchers.append(launcher)
        while launcher.status is None:
            self.world.pause(0.5)
        excuses = {"full", "lie", "second", "kill_launcher"} & {fault.kind for fault in self._plan.faults}
        if launcher.status == 2 and not excuses and not (self._folder / "summary.json").exists():
            raise Violation("a launch was refused, and nothing was wrong")
        return launcher.status

    def _main(self, process: Process) -> int:
        """What a worker runs: the command line of a recipe."""
        try:
            while not command_line._trained(self._recipe.train, "linear_regression", process.runtime, []):
                pass
            status = 0
        except SystemExit as error:
            status = int(error.code or 0)
        except Violation:
            raise
        except Exception as error:
            if process.runtime.is_lost_rank(error):  # printed, as Python does with an error
                status = 1
            else:
                raise Violation(f"{process.name}: {traceback.format_exc()}") from error
        for call in process.at_exit:
            call()
        return status

    def _happen(self, fault: Fault) -> None:
        self.world.say(str(fault))
        getattr(self, f"_{fault.kind}")(fault.number)

    def _workers(self) -> list[Process]:
        return [worker for worker in self._cluster.workers if worker.is_alive]

    def _kill(self, number: int) -> None:
        _kill_one(self._workers(), number)

    def _kill_launcher(self, number: int) -> None:
        _kill_one([launcher for launcher in self._launchers if launcher.is_alive], number)

    def _host_of(self, number: int) -> str:
        return list(self._plan.slots)[number % len(self._plan.slots)]

    def _host(self, number: int) -> None:
        host = self._host_of(number)
        for worker in self._workers():
            if worker.host == host:
                worker.kill()
        self._disk.cut_power({host})

    def _power(self, number: int) -> None:
        for process in (*self._launchers, *self._workers()):
            process.kill()
        self._disk.cut_power(set(HOSTS))

    def _leave(self, number: int) -> None:
        if len(self._cluster.slots) > 1:
            self._cluster.slots.pop(self._host_of(number), None)

    def _join(self, number: int) -> None:
        host = self._host_of(number)
        self._cluster.slots[host] = self._plan.slots[host]

    def _full(self, number: int) -> None:
        self._disk.full_until = self.world.now + 2

    def _lie(self, number: int) -> None:
        self._disk.lies_until, self._is_trusted = self.world.now + 2, False

    def _terminate(self, number: int) -> None:
        for worker in self._workers():
            self.world.send_signal(worker, signal.SIGTERM)

    def _second(self, number: int) -> None:
        self._begin_user()

    def _write(self, folder: Path, *contents: Any) -> None:
        _write_checkpoint(folder, *contents)
        self._saved = max(self._saved, int(folder.name.removeprefix("step-")))
        self.world.say(f"{folder.name} is saved")

    def _check(self) -> None:
        """After each event: what was reported saved is there."""
        names = self._disk.names("run/checkpoints")
        if (
            self._is_trusted
            and self._saved
            and not any(int(name.removeprefix("step-")) >= self._saved for name in names if name[0] == "s")
        ):
            raise Violation(f"step {self._saved} was saved, and is lost; there is {', '.join(names) or 'nothing'}")

    def _check_end(self) -> None:
        """Weights are checked in each step; here, what is left of the run on a disk that can be trusted."""
        if not self._is_trusted:
            return
        self._check_records()
        found, problems = checkpoint_files.newest(self._folder)
        if found is None or found.state["position"]["step"] != self._recipe.last_step:
            raise Violation(f"the last checkpoint is not that of step {self._recipe.last_step}: {problems}")

    def _check_records(self) -> None:
        for is_right, line in example_log.check(self._folder):
            if not is_right:
                raise Violation(f"ledger: {line}")
        events, problems = metrics_file.read(self._folder / "metrics.jsonl")
        steps = [event["step"] for event in events if "train_loss" in event]
        if problems or steps != list(range(1, self._recipe.last_step + 1)):
            raise Violation(f"metrics.jsonl has the steps {steps}, and the problems {problems}")

    def _changes(self) -> list[tuple[Any, str, Any]]:
        """What the code under test finds instead of the clock, threads, signals and files of Python."""
        world = self.world
        threads, output = Threading(world), _Output(world)
        clock = SimpleNamespace(
            time=lambda: world.now, perf_counter=lambda: world.now, monotonic=lambda: world.now, sleep=world.pause
        )
        signals = SimpleNamespace(
            SIGTERM=signal.SIGTERM, SIG_DFL=signal.SIG_DFL, SIG_IGN=signal.SIG_IGN, signal=self._handle
        )
        system = _System(world)
        later = SimpleNamespace(register=lambda call, *args: self._process.at_exit.append(lambda: call(*args)))
        queues = SimpleNamespace(Queue=lambda: Queue(world))
        futures = [
            (checkpoint, "ThreadPoolExecutor", lambda **kwargs: Executor(world)),
            (checkpoint, "wait", lambda futures: [future.exception() for future in futures]),
        ]
        return [
            *self._disk.changes(),
            *(
                (module, "time", clock)
                for module in (command_line, run_lock, step_statistics, progress, driver, discovery, timeout)
            ),
            (sys.modules["common.training.goodput"], "time", clock),
            *((module, "threading", threads) for module in (command_line, run_lock, prefetch, driver, discovery)),
            (registration, "threading", threads),
            *((module, "signal", signals) for module in (command_line, preemption)),
            *((module, "os", system) for module in (command_line, launcher_env)),
            *futures,
            (run_lock, "atexit", later),
            (prefetch, "SimpleQueue", queues.Queue),
            (driver, "queue", queues),
            *((module, "set", _OrderedSet) for module in (discovery, registration)),
            (discovery, "random", random.Random(f"driver {self._plan.seed}")),
            (logging.getLogger(), "disabled", True),
            (command_line, "compose", lambda task, overrides: copy.deepcopy(self._cfg)),
            (run_log, "ScalarWriter", _NoScalars),
            (run_log, "to_yaml", lambda cfg: "a configuration"),
            (checkpoint_files, "write", self._write),
            (checkpoint_files, "_write_arrays", _write_arrays),
            *((sys, name, output) for name in ("stdout", "stderr")),
        ]

    @property
    def _process(self) -> Process:
        assert self.world.current.process is not None
        return self.world.current.process

    def _handle(self, number: int, handler: Any) -> None:
        self._process.handlers[number] = handler


def _kill_one(processes: Sequence[Process], number: int) -> None:
    if processes:
        processes[number % len(processes)].kill()


class _System:
    """The module os of a process."""

    def __init__(self, world: World) -> None:
        self._world = world

    @property
    def environ(self) -> dict[str, str]:
        process = self._world.current.process
        return process.environ if process else {}

    def _exit(self, status: int) -> None:
        process = self._world.current.process
        assert process is not None
        process.leave(status)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


class _Output:
    """Standard output and errors: they are a part of the trace."""

    encoding = "utf-8"

    def __init__(self, world: World) -> None:
        self._world = world

    def write(self, text: str) -> None:
        process = self._world.current.process
        if text.strip():
            self._world.say(f"{process.name if process else 'user'}: {text.strip()}")

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


class _OrderedSet(dict[Any, None]):
    """A set in the order of its values' coming, not in that of their hashes, which is another one in each process."""

    def __init__(self, values: Iterable[Any] = ()) -> None:
        super().__init__(dict.fromkeys(values))

    def add(self, value: Any) -> None:
        self[value] = None


class _NoScalars:
    """Nothing is written for TensorBoard."""

    def __init__(self, folder: Path) -> None:
        pass

    def write(self, step: int, values: Any) -> None:
        pass


_write_checkpoint = checkpoint_files.write


def _write_arrays(path: Path, arrays: Any) -> str:
    """As that of checkpoint_files, with Python's files, as the simulation does not see those of safetensors."""
    from common import file_io

    from safetensors.numpy import save

    with path.open("wb+") as file:
        file.write(save(dict(arrays)))
        file_io.sync(file)
        file.seek(0)
        return file_io.sha256(file)


@cache
def _default() -> RunConfig:
    return compose("linear_regression", [])


def _configured(plan: Plan, folder: str) -> RunConfig:
    cfg = copy.deepcopy(_default())
    cfg.elastic, cfg.run.dir, cfg.data.ledger = plan.is_elastic, folder, True
    cfg.train.log_every, cfg.train.epochs = 1, 1000
    for name, value in plan.options.items():
        setattr(cfg.train, name, value)
    return cfg


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder in memory, where there is one."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    root = Path(tempfile.mkdtemp(prefix="simulation-", dir=where))
    try:
        yield root
    finally:
        shutil.rmtree(root)


def trace_of(plan: Plan) -> tuple[list[str], str]:
    """What has happened, and what must not have happened; "" if nothing."""
    with _folder() as root:
        simulation = Simulation(plan, root)
        try:
            simulation.run()
            problem = ""
        except Violation as violation:
            problem = str(violation)
    texts = [
        text.replace(str(root), "").replace(f"process {os.getpid()}", "process 1")
        for text in (*simulation.world.trace, problem)
    ]
    return texts[:-1], texts[-1]


def shrunk(plan: Plan) -> Plan:
    """A plan that goes wrong, too, with as few faults as can be."""
    for fault in plan.faults:
        fewer = replace(plan, faults=tuple(other for other in plan.faults if other is not fault))
        if trace_of(fewer)[1]:
            return shrunk(fewer)
    return plan


def problem_of(seed: int) -> str:
    """What goes wrong with a seed, in a job or in another one with parameter servers; "" if nothing does."""
    return trace_of(drawn(seed))[1] or servers.problem_of(seed)


def report(seed: int) -> str:
    """A seed that goes wrong: as few faults as it takes, and what happens."""
    plan = shrunk(drawn(seed))
    trace, problem = trace_of(plan)
    if not problem:
        trace, problem = servers.trace_of(seed)
        return "\n".join([f"seed {seed}, with parameter servers: {problem}", *trace[-MOST_LINES:]])
    return "\n".join([f"seed {seed}: {problem}", *map(str, plan.faults), *trace[-MOST_LINES:]])

"""Pipeline schedules as plain lists of actions, one list per rank, with a checker, a simulator and a text chart.

The model is cut into consecutive model chunks, and chunk p is on stage p % num_stages. Each slice of the global batch
(see topology.py) is cut into micro-batches. With replicas (2, 1) there are two slices: each replica of stage 0 has one
of them, the only replica of stage 1 has both.

Sends and receives are posted without waiting; the computation that needs a received message waits for it.
"""

import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, chain, pairwise, product, starmap
from operator import itemgetter
from typing import NamedTuple

from common.config.schema import PIPELINE_SCHEDULES
from common.distributed.topology import Layout


class ScheduleError(ValueError):
    """A schedule that is incomplete, out of order or in a deadlock."""


class Kind(str, Enum):
    """The kinds of actions.

    backward computes the gradients of input and weights, backward_input and backward_weight compute one of the two.
    """

    forward = "forward"
    backward = "backward"
    backward_input = "backward_input"
    backward_weight = "backward_weight"
    send_activation = "send_activation"
    receive_activation = "receive_activation"
    send_gradient = "send_gradient"
    receive_gradient = "receive_gradient"

    def __str__(self) -> str:
        """The name; Python 3.11 has StrEnum for it."""
        return self.value

    @property
    def is_transfer(self) -> bool:
        """Whether it is a send or a receive."""
        return self in _OTHER_END


# The kind at a transfer's other end, and the chunk there relative to this one.
_OTHER_END = {
    Kind.send_activation: (Kind.receive_activation, 1),
    Kind.receive_activation: (Kind.send_activation, -1),
    Kind.send_gradient: (Kind.receive_gradient, -1),
    Kind.receive_gradient: (Kind.send_gradient, 1),
}
# The receive and the send of a computation, and the chunk that the send goes to relative to this one.
_TRANSFERS = {
    Kind.forward: (Kind.receive_activation, Kind.send_activation, 1),
    Kind.backward: (Kind.receive_gradient, Kind.send_gradient, -1),
    Kind.backward_input: (Kind.receive_gradient, Kind.send_gradient, -1),
}


@dataclass(frozen=True)
class Action:
    """One entry of a schedule.

    Attributes:
        kind: the kind of the action.
        chunk: the model chunk that computes, or whose input or output (or its gradient) is transferred.
        micro_batch: the id of the micro-batch.
    """

    kind: Kind
    chunk: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}(chunk {self.chunk}, micro-batch {self.micro_batch})"

    def to(self, kind: Kind) -> "Action":
        """The action of another kind on the same model chunk and micro-batch."""
        return Action(kind, self.chunk, self.micro_batch)

    @property
    def other_end(self) -> "Action":
        """The receive that belongs to this send, or the send that belongs to this receive."""
        kind, distance = _OTHER_END[self.kind]
        return Action(kind, self.chunk + distance, self.micro_batch)


def make(name: str, layout: Layout) -> list[list[Action]]:
    """The schedule of each rank.

    With one stage, every schedule runs forward and backward of one micro-batch after the other.

    gpipe: all forwards, then all backwards, both in ascending order (the paper's backwards descend). Huang et al.,
    "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism", 2019,
    https://arxiv.org/abs/1811.06965

    1f1b: num_stages - 1 - s forwards on stage s, then a forward and a backward in turn. The variant with a flush of
    Narayanan et al., "Memory-Efficient Pipeline-Parallel DNN Training", 2021, https://arxiv.org/abs/2006.09503

    interleaved: groups of micro-batches pass through one model chunk after the other. A group has num_stages
    micro-batches in the paper, and at least num_stages here, so that any number is cut evenly. Narayanan et al.,
    "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", 2021,
    https://arxiv.org/abs/2104.04473

    zb_h1: as 1f1b, with backward_weight s micro-batches later on stage s, which the memory of stage 0 permits.
    Qi et al., "Zero Bubble Pipeline Parallelism", 2023, https://arxiv.org/abs/2401.10241

    Args:
        name: one of PIPELINE_SCHEDULES.
        layout: which rank has which model chunks and micro-batches.

    Raises:
        ValueError: the name is unknown, or the schedule does not permit this number of chunks per stage.
    """
    if name not in PIPELINE_SCHEDULES:
        raise ValueError(f"a pipeline schedule is one of {', '.join(PIPELINE_SCHEDULES)}. Received: {name}")
    if layout.num_stages > 1 and (name == "interleaved") != (layout.virtual_stages_per_rank > 1):
        rule = "interleaved needs two or more chunks per stage, the others have one"
        raise ValueError(f"{rule}. Received: {name}, virtual_stages_per_rank={layout.virtual_stages_per_rank}")
    return [_with_transfers(_computations(name, layout, rank), layout) for rank in range(layout.num_ranks)]


def _computations(name: str, layout: Layout, rank: int) -> list[Action]:
    """A rank's computations, ordered by a logical clock that all ranks share.

    At each tick, each stage is due to run one forward. Its backward is due later by as many ticks as there are
    micro-batches in flight from that stage to the last one and back. With one chunk per stage, an action never depends
    on an action of another rank that is due later, so there is no deadlock for any numbers of replicas.
    """
    stage, chunks, groups = layout.stage_of(rank), layout.chunks_of(rank), _groups(layout)
    # A rank's batch slices are consecutive, so its ticks are, too. If every stage has ranks with several slices, more
    # micro-batches must be in flight.
    spare = layout.num_batch_slices - max(layout.replicas_per_stage)
    here, *after = layout.replicas_per_stage[stage:]
    delay = here + sum(after) + spare
    if name == "gpipe" and layout.num_stages > 1:
        delay = layout.num_micro_batches * layout.num_batch_slices
    if name == "interleaved":
        delay += (layout.virtual_stages_per_rank - 1) * len(groups[0]) + sum(after)
    order = chain.from_iterable(product(range(len(chunks)), group) for group in groups)
    mine = [(tick, turn, each) for tick, (turn, each) in enumerate(order) if layout.rank_of(stage, each) == rank]
    backward = Kind.backward_input if name == "zb_h1" else Kind.backward
    due = [(tick + delay, Action(backward, chunks[-1 - turn], each)) for tick, turn, each in mine]
    if name == "zb_h1":
        due += [(tick + layout.num_ranks + spare, Action(Kind.backward_weight, stage, each)) for tick, _, each in mine]
    due += [(tick, Action(Kind.forward, chunks[turn], each)) for tick, turn, each in mine]
    # The sort is stable: of the actions due at the same tick, those that another rank waits for come first.
    return [action for _, action in sorted(due, key=itemgetter(0))]


def _groups(layout: Layout) -> list[range]:
    """The micro-batches in groups, each large enough to keep all ranks busy if possible; the first is the largest.

    The groups only matter for interleaved: with one chunk per stage, the order does not depend on them.
    """
    rows = layout.num_micro_batches
    num_groups = max(1, rows // math.ceil(layout.num_ranks / layout.num_batch_slices))
    bounds = [math.ceil(rows * group / num_groups) * layout.num_batch_slices for group in range(num_groups + 1)]
    return list(starmap(range, pairwise(bounds)))


def _with_transfers(computations: list[Action], layout: Layout) -> list[Action]:
    """Adds transfers: each send right after its computation, each receive one computation before it is needed."""
    receives, sends = zip(*(_transfers(computation, layout) for computation in computations), strict=True)
    posted = chain.from_iterable(zip((*receives[1:], None), computations, sends, strict=True))
    return [action for action in (receives[0], *posted) if action]


def _transfers(action: Action, layout: Layout) -> tuple[Action | None, Action | None]:
    """The receive that a computation waits for and the send of its result; None where there is none."""
    if action.kind not in _TRANSFERS:
        return None, None
    receive, send, step = _TRANSFERS[action.kind]
    chunks = range(layout.num_chunks)
    return (
        action.to(receive) if action.chunk - step in chunks else None,
        action.to(send) if action.chunk + step in chunks else None,
    )


def check(schedules: Sequence[Sequence[Action]], layout: Layout) -> None:
    """Checks that schedules are complete, in order and free of deadlocks.

    Raises:
        ScheduleError: they are not; the message names the rank, the action and the problem.
    """
    if len(schedules) != layout.num_ranks:
        raise ScheduleError(f"there are {len(schedules)} schedules for {layout.num_ranks} ranks")
    for rank, actions in enumerate(schedules):
        counts, position = Counter(actions), {action: index for index, action in enumerate(actions)}
        sequences = list(_sequences(rank, counts, layout))
        due = dict.fromkeys(chain.from_iterable(sequences))
        for action in [*due, *actions]:
            if action not in due:
                raise ScheduleError(f"rank {rank}: {action} does not belong there")
            if counts[action] != 1:
                raise ScheduleError(f"rank {rank}: {action} occurs {counts[action]} times instead of once")
        for earlier, later in chain.from_iterable(map(pairwise, sequences)):
            if position[earlier] > position[later]:
                raise ScheduleError(f"rank {rank}: {later} comes before {earlier}")
    simulate(schedules, layout)


def _sequences(rank: int, counts: Counter[Action], layout: Layout) -> Iterator[list[Action]]:
    """All actions of a rank, in sequences whose order matters; `counts` says which backwards are split.

    Raises:
        ScheduleError: the same backward is both whole and split.
    """
    for chunk, micro_batch in product(layout.chunks_of(rank), layout.micro_batches_of(rank)):
        forward, whole, *halves = (Action(kind, chunk, micro_batch) for kind in Kind if not kind.is_transfer)
        is_split = any(counts[half] for half in halves)
        if is_split and counts[whole]:
            raise ScheduleError(f"rank {rank}: {whole} is there both whole and split")
        computations = [forward, *(halves if is_split else [whole])]
        yield computations
        for computation in computations:
            receive, send = _transfers(computation, layout)
            yield [action for action in (receive, computation, send) if action]


@dataclass(frozen=True)
class Costs:
    """The costs of a whole stage's computations for one micro-batch, in any unit of time.

    Attributes:
        forward: the cost of forward.
        backward_input: the cost of the gradient of the input.
        backward_weight: the cost of the gradient of the weights; a whole backward costs the sum of both.
        send: the time of a transfer from when both ends are posted; it overlaps with computations.
        chunk_costs: the cost of each model chunk relative to an even cut; empty: all are 1.
    """

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    send: float = 0.0
    chunk_costs: Sequence[float] = ()

    def of(self, action: Action, layout: Layout) -> float:
        """The cost of a computation."""
        whole = self.backward_input + self.backward_weight
        cost: float = whole if action.kind == Kind.backward else getattr(self, action.kind)
        return cost * (self.chunk_costs[action.chunk] if self.chunk_costs else 1) / layout.virtual_stages_per_rank


class Span(NamedTuple):
    """A computation with its start and end."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The simulated computations of all ranks.

    Attributes:
        spans: for each rank, its computations in order.
    """

    spans: list[list[Span]]

    @property
    def makespan(self) -> float:
        """The time at which the last rank finishes."""
        return max(spans[-1].end for spans in self.spans)

    @property
    def bubble(self) -> list[float]:
        """For each rank, the idle fraction of the makespan."""
        return [1 - sum(span.end - span.start for span in spans) / self.makespan for spans in self.spans]

    @property
    def peak_activations(self) -> list[int]:
        """For each rank, the peak number of activations held, each of one model chunk and one micro-batch.

        They are held from the start of forward to the end of backward, or of backward_weight if backward is split.
        """
        change = {Kind.forward: 1, Kind.backward_input: 0}
        return [max(accumulate(change.get(span.action.kind, -1) for span in spans)) for spans in self.spans]


def simulate(schedules: Sequence[Sequence[Action]], layout: Layout, costs: Costs | None = None) -> Timeline:
    """Simulates schedules.

    Args:
        schedules: the actions of each rank.
        layout: the layout that the schedules were made for.
        costs: the costs of the computations; by default, Costs().

    Raises:
        ScheduleError: there is a deadlock; the message names the action that each rank waits at.
    """
    costs = costs or Costs()
    spans: list[list[Span]] = [[] for _ in schedules]
    left = [deque(actions) for actions in schedules]
    posted: dict[Action, float] = {}
    is_stuck = False
    while not is_stuck:
        is_stuck = True
        for actions, done in zip(left, spans, strict=True):
            while actions and (arrival := _arrival(actions[0], layout, costs, posted)) is not None:
                action, now = actions.popleft(), done[-1].end if done else 0.0
                if action.kind.is_transfer:
                    posted[action] = now
                else:
                    start = max(now, arrival)
                    done.append(Span(action, start, start + costs.of(action, layout)))
                is_stuck = False
    if any(left):
        waits = (f"rank {rank} waits at {actions[0]}" for rank, actions in enumerate(left) if actions)
        raise ScheduleError(f"deadlock: {', '.join(waits)}")
    return Timeline(spans)


def _arrival(action: Action, layout: Layout, costs: Costs, posted: dict[Action, float]) -> float | None:
    """The time at which the message that an action needs arrives; None if one of its two ends is not posted yet."""
    receive, _ = _transfers(action, layout)
    if receive is None:
        return 0.0
    if receive not in posted or receive.other_end not in posted:
        return None
    return max(posted[receive], posted[receive.other_end]) + costs.send


def bubble(name: str, num_stages: int, num_micro_batches: int, virtual_stages_per_rank: int = 1) -> float:
    """The idle fraction of a step in theory, with equal stages and transfers that take no time.

    zb_h1 assumes that forward, backward_input and backward_weight cost the same; the others hold for any costs. The
    schedules of make() have exactly this bubble, except for interleaved and zb_h1 with fewer micro-batches than stages:
    there it is larger, because the time of the first micro-batch to the last stage and back then decides.
    """
    work = num_micro_batches * {"interleaved": virtual_stages_per_rank, "zb_h1": 3}.get(name, 1)
    return (num_stages - 1) / (work + num_stages - 1)


def gantt(timeline: Timeline, width: int = 100) -> str:
    """A text chart with a row per rank: F = forward, B = backward, I = backward_input, W = backward_weight, . = idle.

    Args:
        timeline: the timeline to draw.
        width: maximum number of columns; a cell shows the number of its micro-batch if there is room.
    """
    label_width = len(f"rank {len(timeline.spans)} ")
    columns_per_time = (width - label_width) / timeline.makespan
    shortest = min(span.end - span.start for spans in timeline.spans for span in spans)
    if shortest * columns_per_time >= 2:  # draw equal costs as cells of equal width
        columns_per_time = int(shortest * columns_per_time) / shortest
    rows = []
    for rank, spans in enumerate(timeline.spans):
        row = ""
        for action, start, end in spans:
            row = row.ljust(round(start * columns_per_time), ".")
            row += _cell(action, round(end * columns_per_time) - len(row))
        rows.append(f"rank {rank}".ljust(label_width) + row.ljust(round(timeline.makespan * columns_per_time), "."))
    return "\n".join(rows)


def _cell(action: Action, width: int) -> str:
    letter = {Kind.backward_input: "I", Kind.backward_weight: "W"}.get(action.kind, action.kind[0].upper())
    text = f"{letter}{action.micro_batch}"
    return (text if len(text) <= width else letter[:width]).ljust(width, "-")

"""Pipeline schedules as plain lists of actions, one list per rank, with a checker, a simulator and a text chart.

The model is cut into consecutive parts, and part p is on stage p % num_stages. The global batch is cut into lanes, as
few as give each replica of a stage equally many, and each lane into micro-batches. With replicas (2, 1) there are two
lanes: each replica of stage 0 has one, the only replica of stage 1 has both.

Sends and receives are posted, and no rank waits there: the computation that needs what is received waits for it.
"""

import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum, auto
from functools import cached_property
from itertools import accumulate, chain, pairwise, product, starmap
from operator import itemgetter
from typing import NamedTuple

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb_h1")


class ScheduleError(ValueError):
    """A schedule that is incomplete, out of order or would never end."""


class Kind(StrEnum):
    """What is done; backward makes the gradients of input and weights, backward_input and backward_weight one each."""

    forward = auto()
    backward = auto()
    backward_input = auto()
    backward_weight = auto()
    send_activation = auto()
    receive_activation = auto()
    send_gradient = auto()
    receive_gradient = auto()

    @property
    def is_transfer(self) -> bool:
        """Whether it is a send or a receive."""
        return self in _OTHER_END


# The kind at a transfer's other end, and how many parts further on that is.
_OTHER_END = {
    Kind.send_activation: (Kind.receive_activation, 1),
    Kind.receive_activation: (Kind.send_activation, -1),
    Kind.send_gradient: (Kind.receive_gradient, -1),
    Kind.receive_gradient: (Kind.send_gradient, 1),
}
# What a computation receives and sends, and how many parts further on the send goes.
_TRANSFERS = {
    Kind.forward: (Kind.receive_activation, Kind.send_activation, 1),
    Kind.backward: (Kind.receive_gradient, Kind.send_gradient, -1),
    Kind.backward_input: (Kind.receive_gradient, Kind.send_gradient, -1),
}


@dataclass(frozen=True)
class Action:
    """One entry of a schedule.

    Attributes:
        kind: what is done.
        part: the part that computes, or whose input or output, or the gradient of one, is transferred.
        micro_batch: its id.
    """

    kind: Kind
    part: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}(part {self.part}, micro-batch {self.micro_batch})"

    def to(self, kind: Kind) -> "Action":
        """The action of another kind on the same part and micro-batch."""
        return Action(kind, self.part, self.micro_batch)

    @property
    def other_end(self) -> "Action":
        """The receive that belongs to this send, or the send that belongs to this receive."""
        kind, distance = _OTHER_END[self.kind]
        return Action(kind, self.part + distance, self.micro_batch)


@dataclass(frozen=True)
class Layout:
    """Which rank has which parts and which micro-batches.

    Ranks are numbered stage by stage. The replicas of a stage share the lanes out in order, and micro-batch j of lane l
    has the id j * num_lanes + l.

    Attributes:
        replicas_per_stage: number of replicas of each stage.
        num_micro_batches: per lane.
        parts_per_stage: 1 unless the schedule is interleaved.
    """

    replicas_per_stage: tuple[int, ...]
    num_micro_batches: int
    parts_per_stage: int = 1

    def __post_init__(self) -> None:
        if min(*(self.replicas_per_stage or [0]), self.num_micro_batches, self.parts_per_stage) < 1:
            raise ValueError(f"each number must be at least 1. Received: {self}")
        if self.num_stages == 1 and self.parts_per_stage > 1:
            raise ValueError(
                f"a single stage has nothing to interleave with: parts_per_stage must be 1. Received: {self}"
            )

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self.replicas_per_stage)

    @property
    def num_parts(self) -> int:
        """Number of parts of the model."""
        return self.num_stages * self.parts_per_stage

    @property
    def num_ranks(self) -> int:
        """Number of replicas of all stages."""
        return sum(self.replicas_per_stage)

    @cached_property
    def num_lanes(self) -> int:
        """Number of lanes of the global batch."""
        return math.lcm(*self.replicas_per_stage)

    @cached_property
    def _first_ranks(self) -> list[int]:
        return [0, *accumulate(self.replicas_per_stage)]

    def stage_of(self, rank: int) -> int:
        """The stage that a rank is a replica of."""
        return next(stage for stage, end in enumerate(self._first_ranks[1:]) if rank < end)

    def replica_of(self, rank: int) -> int:
        """The rank's number among the replicas of its stage."""
        return rank - self._first_ranks[self.stage_of(rank)]

    def lanes_of(self, rank: int) -> range:
        """The lanes that a rank handles."""
        num_lanes = self.num_lanes // self.replicas_per_stage[self.stage_of(rank)]
        return range(self.replica_of(rank) * num_lanes, (self.replica_of(rank) + 1) * num_lanes)

    def micro_batches_of(self, rank: int) -> list[int]:
        """The ids of the rank's micro-batches, ascending."""
        lanes = self.lanes_of(rank)
        return [row * self.num_lanes + lane for row in range(self.num_micro_batches) for lane in lanes]

    def parts_of(self, rank: int) -> range:
        """The parts that a rank has, ascending."""
        return range(self.stage_of(rank), self.num_parts, self.num_stages)

    def rank_of(self, part: int, micro_batch: int) -> int:
        """The rank that handles a micro-batch on a part."""
        stage, lane = part % self.num_stages, micro_batch % self.num_lanes
        return self._first_ranks[stage] + lane * self.replicas_per_stage[stage] // self.num_lanes


def make(name: str, layout: Layout) -> list[list[Action]]:
    """The schedule of each rank.

    On a single stage, each of them takes one micro-batch after the other, forward and backward.

    gpipe: all forwards, then all backwards, these in ascending order too, while the paper descends. Huang et al.,
    "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism", 2019,
    https://arxiv.org/abs/1811.06965

    1f1b: num_stages - 1 - s forwards on stage s, then a forward and a backward in turn. The variant with a flush of
    Narayanan et al., "Memory-Efficient Pipeline-Parallel DNN Training", 2021, https://arxiv.org/abs/2006.09503

    interleaved: groups of micro-batches pass part after part. A group has num_stages of them in the paper, and here at
    least so many, so that any number is cut evenly. Narayanan et al., "Efficient Large-Scale Language Model Training
    on GPU Clusters Using Megatron-LM", 2021, https://arxiv.org/abs/2104.04473

    zb_h1: as 1f1b, with backward_weight s micro-batches behind on stage s, which is what the memory of stage 0 allows.
    Qi et al., "Zero Bubble Pipeline Parallelism", 2023, https://arxiv.org/abs/2401.10241

    Args:
        name: one of SCHEDULES.
        layout: who has which parts and micro-batches.

    Raises:
        ValueError: the name is unknown, or the number of parts per stage does not suit it.
    """
    if name not in SCHEDULES:
        raise ValueError(f"a pipeline schedule is one of {', '.join(SCHEDULES)}. Received: {name}")
    if layout.num_stages > 1 and (name == "interleaved") != (layout.parts_per_stage > 1):
        rule = "interleaved needs two or more parts per stage, the others have one"
        raise ValueError(f"{rule}. Received: {name}, parts_per_stage={layout.parts_per_stage}")
    return [_with_transfers(_computations(name, layout, rank), layout) for rank in range(layout.num_ranks)]


def _computations(name: str, layout: Layout, rank: int) -> list[Action]:
    """What a rank computes, in the order of a clock that all ranks share.

    Each tick has one forward on each stage. Its backward is due as many ticks later as there are micro-batches on the
    way from that stage to the last one and back. With one part per stage, what an action waits for on another rank is
    never due later than itself, so there is no deadlock whatever the numbers of replicas.
    """
    stage, parts, groups = layout.stage_of(rank), layout.parts_of(rank), _groups(layout)
    # A rank's lanes are neighbours, so its ticks come in runs. If that is so for all stages, more must be under way.
    spare = layout.num_lanes - max(layout.replicas_per_stage)
    here, *after = layout.replicas_per_stage[stage:]
    delay = here + sum(after) + spare
    if name == "gpipe" and layout.num_stages > 1:
        delay = layout.num_micro_batches * layout.num_lanes
    if name == "interleaved":
        delay += (layout.parts_per_stage - 1) * len(groups[0]) + sum(after)
    order = chain.from_iterable(product(range(len(parts)), group) for group in groups)
    mine = [(tick, turn, each) for tick, (turn, each) in enumerate(order) if layout.rank_of(stage, each) == rank]
    backward = Kind.backward_input if name == "zb_h1" else Kind.backward
    due = [(tick + delay, Action(backward, parts[-1 - turn], each)) for tick, turn, each in mine]
    if name == "zb_h1":
        due += [(tick + layout.num_ranks + spare, Action(Kind.backward_weight, stage, each)) for tick, _, each in mine]
    due += [(tick, Action(Kind.forward, parts[turn], each)) for tick, turn, each in mine]
    # Of what is due at the same tick, the sort keeps this order: first what another rank waits for.
    return [action for _, action in sorted(due, key=itemgetter(0))]


def _groups(layout: Layout) -> list[range]:
    """All micro-batches in groups, none larger than the first, each enough to keep all ranks busy if there are so many.

    Matters to interleaved alone: with one part per stage, the order is the same however they are grouped.
    """
    rows = layout.num_micro_batches
    num_groups = max(1, rows // math.ceil(layout.num_ranks / layout.num_lanes))
    bounds = [math.ceil(rows * group / num_groups) * layout.num_lanes for group in range(num_groups + 1)]
    return list(starmap(range, pairwise(bounds)))


def _with_transfers(computations: list[Action], layout: Layout) -> list[Action]:
    """Posts each send right after what makes it, and each receive one computation ahead of what needs it."""
    receives, sends = zip(*(_transfers(computation, layout) for computation in computations), strict=True)
    posted = chain.from_iterable(zip((*receives[1:], None), computations, sends, strict=True))
    return [action for action in (receives[0], *posted) if action]


def _transfers(action: Action, layout: Layout) -> tuple[Action | None, Action | None]:
    """The receive that a computation waits for and the send of what it makes; None if there is no such thing."""
    if action.kind not in _TRANSFERS:
        return None, None
    receive, send, step = _TRANSFERS[action.kind]
    parts = range(layout.num_parts)
    return (
        action.to(receive) if action.part - step in parts else None,
        action.to(send) if action.part + step in parts else None,
    )


def check(schedules: Sequence[Sequence[Action]], layout: Layout) -> None:
    """Refuses schedules that are incomplete, out of order or in a deadlock.

    Raises:
        ScheduleError: names the rank, the action and what is wrong with it.
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
    """All that a rank has to do, in sequences whose order matters; backwards are whole or split as they are in counts.

    Raises:
        ScheduleError: a backward is both.
    """
    for part, micro_batch in product(layout.parts_of(rank), layout.micro_batches_of(rank)):
        forward, whole, *halves = (Action(kind, part, micro_batch) for kind in Kind if not kind.is_transfer)
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
    """What a whole stage's computations cost for one micro-batch, in any unit of time.

    Attributes:
        forward: of the forward.
        backward_input: of the input's gradient.
        backward_weight: of the weights' gradient; a whole backward costs the sum of both.
        send: from when both ends of a transfer are posted until it is there; the ranks compute meanwhile.
        part_costs: each part's cost relative to an even cut; all 1 if empty.
    """

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    send: float = 0.0
    part_costs: Sequence[float] = ()

    def of(self, action: Action, layout: Layout) -> float:
        """The cost of a computation."""
        whole = self.backward_input + self.backward_weight
        cost: float = whole if action.kind == Kind.backward else getattr(self, action.kind)
        return cost * (self.part_costs[action.part] if self.part_costs else 1) / layout.parts_per_stage


class Span(NamedTuple):
    """A computation and when it starts and ends."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When each rank computes what.

    Attributes:
        spans: each rank's computations in their order.
    """

    spans: list[list[Span]]

    @property
    def makespan(self) -> float:
        """The time at which the last rank is done."""
        return max(spans[-1].end for spans in self.spans)

    @property
    def bubble(self) -> list[float]:
        """Each rank's idle share of the makespan."""
        return [1 - sum(span.end - span.start for span in spans) / self.makespan for spans in self.spans]

    @property
    def peak_activations(self) -> list[int]:
        """The largest number of pairs of a part and a micro-batch whose activations a rank holds at once.

        They are held from the start of forward to the end of backward, or of backward_weight if that is split.
        """
        change = {Kind.forward: 1, Kind.backward_input: 0}
        return [max(accumulate(change.get(span.action.kind, -1) for span in spans)) for spans in self.spans]


def simulate(schedules: Sequence[Sequence[Action]], layout: Layout, costs: Costs | None = None) -> Timeline:
    """Runs schedules on paper.

    Args:
        schedules: the actions of each rank.
        layout: what they were made for.
        costs: the defaults of Costs if not given.

    Raises:
        ScheduleError: a deadlock; the message has what each rank waits at.
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
    """When a rank has what an action needs from another one; None while one of the two has not posted it."""
    receive, _ = _transfers(action, layout)
    if receive is None:
        return 0.0
    if receive not in posted or receive.other_end not in posted:
        return None
    return max(posted[receive], posted[receive.other_end]) + costs.send


def bubble(name: str, num_stages: int, num_micro_batches: int, parts_per_stage: int = 1) -> float:
    """Idle share of a step by theory, with equal stages and transfers that cost nothing.

    For zb_h1, forward, backward_input and backward_weight cost the same; for the others, anything. The schedules of
    make have this very bubble, except for interleaved and zb_h1 with fewer micro-batches than stages: that is larger,
    as the first micro-batch's way to the last stage and back then decides.
    """
    work = num_micro_batches * {"interleaved": parts_per_stage, "zb_h1": 3}.get(name, 1)
    return (num_stages - 1) / (work + num_stages - 1)


def gantt(timeline: Timeline, width: int = 100) -> str:
    """A chart with a row per rank: F(orward), B(ackward), I(nput's gradient), W(eights' gradient), dots for idle.

    Args:
        timeline: what is shown.
        width: number of columns at most; a cell has the number of its micro-batch where there is room.
    """
    label_width = len(f"rank {len(timeline.spans)} ")
    columns_per_time = (width - label_width) / timeline.makespan
    shortest = min(span.end - span.start for spans in timeline.spans for span in spans)
    if shortest * columns_per_time >= 2:  # then equal costs have equal cells
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

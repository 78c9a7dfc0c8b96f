"""Pipeline schedules on paper: all are valid, as good as theory has them, and what is broken is found and named."""

from collections.abc import Callable

from common.config.schema import PIPELINE_SCHEDULES
from common.distributed.topology import Layout
from common.parallel.pipeline_schedule import Action, Costs, Kind, ScheduleError, bubble, check, gantt, make, simulate

import pytest

Schedules = list[list[Action]]


def layout_for(name: str, replicas_per_stage: tuple[int, ...], num_micro_batches: int) -> Layout:
    """With two parts per stage if the schedule is interleaved."""
    return Layout(replicas_per_stage, num_micro_batches, 2 if name == "interleaved" else 1)


@pytest.mark.parametrize("num_stages", range(2, 9))
@pytest.mark.parametrize("name", PIPELINE_SCHEDULES)
def test_schedules_are_valid_and_as_good_as_in_theory(name: str, num_stages: int) -> None:
    for num_micro_batches in range(1, 33):
        layout = layout_for(name, (1,) * num_stages, num_micro_batches)
        schedules = make(name, layout)
        check(schedules, layout)
        timeline = simulate(schedules, layout)
        in_theory = bubble(name, num_stages, num_micro_batches, layout.virtual_stages_per_rank)
        of_1f1b = bubble("1f1b", num_stages, num_micro_batches)
        if name in ("gpipe", "1f1b") or num_micro_batches >= num_stages:
            assert timeline.bubble == pytest.approx([in_theory] * num_stages)
        else:  # one micro-batch does not profit from more parts
            assert in_theory < max(timeline.bubble) <= of_1f1b + 1e-9
        if name == "zb_h1":
            assert max(timeline.bubble) < of_1f1b
        if name != "interleaved":
            peak = num_micro_batches if name == "gpipe" else min(num_stages, num_micro_batches)
            assert max(timeline.peak_activations) == peak


@pytest.mark.parametrize("name", PIPELINE_SCHEDULES)
@pytest.mark.parametrize("replicas", [(2, 2), (3, 1), (1, 3), (2, 1), (3, 2), (2, 3), (1, 2, 1), (1, 3, 4), (4, 6)])
def test_stages_may_have_unequal_numbers_of_replicas(name: str, replicas: tuple[int, ...]) -> None:
    for num_micro_batches in (1, 2, 5):
        layout = layout_for(name, replicas, num_micro_batches)
        check(make(name, layout), layout)


@pytest.mark.parametrize("replicas", [(3, 1), (1, 3), (3, 2), (2, 3), (1, 2, 1)])
def test_unequal_replicas_need_less_memory_than_gpipe_and_no_more_time(replicas: tuple[int, ...]) -> None:
    layout = Layout(replicas, 8)
    gpipe, one_f_one_b, zb_h1 = (simulate(make(name, layout), layout) for name in ("gpipe", "1f1b", "zb_h1"))
    assert zb_h1.makespan <= one_f_one_b.makespan
    assert one_f_one_b.makespan <= gpipe.makespan
    assert max(zb_h1.peak_activations) < max(gpipe.peak_activations) / 2


@pytest.mark.parametrize("name", PIPELINE_SCHEDULES)
@pytest.mark.parametrize("num_replicas", [1, 3])
def test_one_stage_takes_its_micro_batches_in_turn(name: str, num_replicas: int) -> None:
    layout = Layout((num_replicas,), 4)
    backward = ["backward_input", "backward_weight"] if name == "zb_h1" else ["backward"]
    for rank, actions in enumerate(make(name, layout)):
        assert [action.kind for action in actions] == ["forward", *backward] * 4
        assert list(dict.fromkeys(action.micro_batch for action in actions)) == layout.micro_batches_of(rank)


@pytest.mark.parametrize("replicas", [(2, 2), (3, 1), (4, 6), (1, 2, 3)])
def test_each_micro_batch_is_handled_once_per_part(replicas: tuple[int, ...]) -> None:
    layout = Layout(replicas, 5, 2)
    for chunk in range(layout.num_chunks):
        stage = [rank for rank in range(layout.num_ranks) if chunk in layout.chunks_of(rank)]
        assert [layout.replica_of(rank) for rank in stage] == list(range(replicas[chunk % len(replicas)]))
        handled = {each: rank for rank in stage for each in layout.micro_batches_of(rank)}
        assert handled == {each: layout.rank_of(chunk, each) for each in range(5 * layout.num_batch_slices)}


def test_receives_are_posted_one_computation_ahead() -> None:
    _, last = make("1f1b", Layout((1, 1), 2))
    assert [str(action.kind) for action in last] == [
        *("receive_activation", "forward"),
        *("receive_activation", "backward", "send_gradient"),
        *("forward", "backward", "send_gradient"),
    ]


def test_transfers_overlap_with_computations() -> None:
    layout = Layout((1, 1), 8)
    free, cheap = (simulate(make("gpipe", layout), layout, Costs(send=send)) for send in (0.0, 0.5))
    assert cheap.makespan == free.makespan + 2 * 0.5  # the first activation and the first gradient alone are waited for


def test_the_costliest_part_sets_the_pace() -> None:
    layout = Layout((1, 1), 8)
    timeline = simulate(make("1f1b", layout), layout, Costs(chunk_costs=(1, 3)))
    assert timeline.makespan == 1 + 8 * 9 + 2
    assert timeline.bubble[0] > 0.6 > 0.1 > timeline.bubble[1]


def swap(schedules: Schedules, rank: int, first: Action, second: Action) -> None:
    exchanged = {first: second, second: first}
    schedules[rank] = [exchanged.get(action, action) for action in schedules[rank]]


F1, B1 = Action(Kind.forward, 1, 0), Action(Kind.backward, 1, 0)
BREAKS: dict[str, tuple[Callable[[Schedules], object], str]] = {
    "swap": (lambda s: swap(s, 1, F1, B1), r"rank 1: backward\(chunk 1, micro-batch 0\) comes before forward"),
    "late receive": (
        lambda s: swap(s, 1, F1, F1.to(Kind.receive_activation)),
        r"rank 1: forward\(chunk 1, micro-batch 0\) comes before receive_activation",
    ),
    "early send": (
        lambda s: swap(s, 1, B1, B1.to(Kind.send_gradient)),
        r"rank 1: send_gradient\(chunk 1, micro-batch 0\) comes before backward",
    ),
    "no send": (
        lambda s: s[0].remove(Action(Kind.send_activation, 0, 2)),
        r"rank 0: send_activation\(chunk 0, micro-batch 2\) occurs 0 times",
    ),
    "no receive": (
        lambda s: s[0].remove(Action(Kind.receive_gradient, 0, 2)),
        r"rank 0: receive_gradient\(chunk 0, micro-batch 2\) occurs 0 times",
    ),
    "two forwards": (lambda s: s[1].append(F1), r"rank 1: forward\(chunk 1, micro-batch 0\) occurs 2 times"),
    "wrong rank": (lambda s: s[0].append(F1), r"rank 0: forward\(chunk 1, micro-batch 0\) does not belong there"),
    "both forms": (
        lambda s: s[1].append(B1.to(Kind.backward_weight)),
        r"rank 1: backward\(chunk 1, micro-batch 0\) is there both whole and split",
    ),
    "no rank": (lambda s: s.pop(), "there are 1 schedules for 2 ranks"),
}


@pytest.mark.parametrize("fault", BREAKS)
def test_a_broken_schedule_is_refused_by_name(fault: str) -> None:
    layout = Layout((1, 1), 4)
    schedules = make("1f1b", layout)
    damage, message = BREAKS[fault]
    damage(schedules)
    with pytest.raises(ScheduleError, match=message):
        check(schedules, layout)


def test_weights_before_the_input_are_refused() -> None:
    layout = Layout((1, 1), 4)
    schedules = make("zb_h1", layout)
    swap(schedules, 1, B1.to(Kind.backward_input), B1.to(Kind.backward_weight))
    with pytest.raises(ScheduleError, match=r"rank 1: .* comes before backward_input\(chunk 1, micro-batch 0\)"):
        check(schedules, layout)


def test_a_deadlock_names_what_each_rank_waits_at() -> None:
    layout = Layout((1, 1), 2)
    eager, patient = make("gpipe", Layout((1, 1), 2))
    backward = Action(Kind.backward, 0, 0)
    ahead = [
        Action(Kind.forward, 0, 0),
        Action(Kind.send_activation, 0, 0),
        backward.to(Kind.receive_gradient),
        backward,
    ]
    eager = [*ahead, *(action for action in eager if action not in ahead)]
    waits = r"rank 0 waits at backward\(chunk 0, micro-batch 0\), rank 1 waits at forward\(chunk 1, micro-batch 1\)"
    with pytest.raises(ScheduleError, match=f"deadlock: {waits}"):
        check([eager, patient], layout)


@pytest.mark.parametrize(
    ("name", "layout"),
    [("2f2b", Layout((1, 1), 1)), ("1f1b", Layout((1, 1), 1, 2)), ("interleaved", Layout((1, 1), 1))],
)
def test_a_schedule_that_does_not_exist_is_refused(name: str, layout: Layout) -> None:
    with pytest.raises(ValueError, match=f"Received: {name}"):
        make(name, layout)


@pytest.mark.parametrize("numbers", [((), 1, 1), ((0, 1), 1, 1), ((1, 1), 0, 1), ((1, 1), 1, 0), ((2,), 1, 2)])
def test_a_layout_that_does_not_exist_is_refused(numbers: tuple[tuple[int, ...], int, int]) -> None:
    with pytest.raises(ValueError, match="Received: Layout"):
        Layout(*numbers)


def test_the_chart_shows_who_does_what_when() -> None:
    layout = Layout((1, 1), 2)
    assert gantt(simulate(make("1f1b", layout), layout), width=26).splitlines() == [
        "rank 0 F0F1....B0--..B1--",
        "rank 1 ..F0B0--F1B1--....",
    ]
    layout = Layout((1,) * 4, 32)
    chart = gantt(simulate(make("zb_h1", layout), layout), width=80)
    assert {len(row) for row in chart.splitlines()} == {80}

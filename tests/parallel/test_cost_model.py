"""What a run would do, said without training."""

from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO

from common.config.composition import compose
from common.config.validation import validate
from common.distributed.topology import Topology
from common.errors import ConfigError
from common.parallel.cost_model import CostModel, LayerProfile
from recipes.commands.plan import main
from tests.helpers.launch import FRAMEWORKS

import pytest

PIPELINE = ("parallel=pipeline", "parallel.balance=flops", "parallel.pipeline_stages=4")


def printed(*words: str) -> str:
    with redirect_stdout(StringIO()) as output:
        main(words)
    return output.getvalue()


def rows(text: str, first: str) -> list[list[str]]:
    """The cells below a table's header, of which the first words are given."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.split()[: len(first.split())] == first.split())
    return [line.split() for line in lines[start + 1 : lines.index("", start)]]


def plan_of(num_ranks: int, *overrides: str) -> CostModel:
    """Of four layers of ten parameters that keep 100 bytes each; the first and the last share a weight of six."""
    cfg = compose("mnist_mlp", overrides)
    topology = validate(cfg, Topology(0, num_ranks, 0, num_ranks))
    weights = [{0: 6, 1: 4}, {2: 10}, {3: 10}, {4: 4, 0: 6}]
    return CostModel(cfg, topology, [LayerProfile("Layer", each, 5, 100, 1.0) for each in weights])


@pytest.fixture(scope="module")
def language_models() -> list[str]:
    """The plan of four stages by each framework."""
    return [printed(f"transformer_lm_{framework}", *PIPELINE) for framework in FRAMEWORKS]


def test_stages_add_up_to_the_whole_model(language_models: list[str]) -> None:
    for text in language_models:
        stages = rows(text, "stage ranks layers")
        assert [cells[:2] for cells in stages] == [[str(stage), str(stage)] for stage in range(4)]
        tied = 256 * 128  # the embedding, which the last stage has, too
        whole = 834_304
        assert f"{whole:,} parameters in 6 layers" in text
        assert sum(int(cells[3].replace(",", "")) for cells in stages) == whole + tied
        assert f"Stages 0 and 3 share a weight of {tied:,} parameters" in text
        assert "rank 3 ....." in text
        assert max(map(len, text.splitlines())) <= 100


def test_the_twins_differ_in_class_names_and_activations_alone(language_models: list[str]) -> None:
    for first, until in (("stage ranks layers", 4), ("ranks weights gradients", 4), ("ranks activations their", 6)):
        tables = [[cells[:until] for cells in rows(text, first)] for text in language_models]
        assert tables[1:] == tables[:-1]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_linear_layer_keeps_its_inputs(framework: str) -> None:
    text = printed(f"linear_regression_{framework}", "data.num_features=1000", "precision=fp64")
    assert rows(text, "ranks weights") == [["0", "0.01", "0.01", "8.00", "8.02", "1"]]


def test_three_replicas_and_one() -> None:
    replicas = ("parallel=pipeline", "parallel.replicas_per_stage=[3,1]", "train.global_batch_size=24")
    plan = plan_of(4, *replicas)
    assert plan.ranges == [range(2), range(2, 4)]
    message = 2 * 5 * 4  # 3 batch slices, 4 micro-batches: 2 examples each, and 5 values of each
    ring, tied = {3: round(4 / 3 * 20 * 4), 1: 0}, round(3 / 2 * 6 * 4)
    assert plan.sent(2) == {
        **{"activations": 4 * message, "their gradients": 0},
        **{"allreduce": ring[3], "tied": tied, "new weights": 0},
    }
    assert plan.sent(3) == {
        **{"activations": 0, "their gradients": 12 * message},
        **{"allreduce": ring[1], "tied": tied, "new weights": 0},
    }
    assert [plan.num_messages(rank) for rank in range(4)] == [4, 4, 4, 12]
    assert [plan.micro_batches_held(rank) for rank in range(4)] == [2, 2, 2, 1]
    assert plan.memory(0) == {"weights": 80, "gradients": 80, "optimizer": 80, "activations": 2 * 200}


def test_parts_of_a_stage_hold_what_each_of_them_keeps() -> None:
    interleaved = ("parallel.schedule=interleaved", "parallel.virtual_stages_per_rank=2", "optimizer=adamw")
    plan = plan_of(2, "parallel=pipeline", *interleaved)
    assert plan.memory(0)["activations"] == plan.micro_batches_held(0) * 100
    assert plan.memory(0)["optimizer"] == 2 * 20 * 4


def test_two_servers_have_a_piece_each_and_workers_no_optimizer() -> None:
    plan = plan_of(5, "parallel=parameter_server", "parallel.num_servers=2")
    assert [plan.partition(server) for server in plan.owners] == [range(24), range(24, 34)]  # in groups of eight
    assert plan.memory(1) == {"weights": 34 * 4, "gradients": 3 * 40, "optimizer": 40, "activations": 0}
    assert plan.memory(2) == {"weights": 34 * 4, "gradients": 34 * 4, "optimizer": 0, "activations": 400}
    assert [plan.sent(rank) for rank in (0, 1, 4)] == [{"answers": 3 * 96}, {"answers": 3 * 40}, {"pushes": 34 * 4}]
    assert [plan.num_messages(rank) for rank in (0, 4)] == [3, 2]


def test_a_sharded_optimizer_keeps_a_piece_of_its_state() -> None:
    plan = plan_of(2, "optimizer=adamw", "optimizer.sharded=true")
    assert plan.memory(1) == {"weights": 136, "gradients": 136, "optimizer": 2 * 40, "activations": 400}
    assert [plan.sent(rank)["new weights"] for rank in range(2)] == [96, 40]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "plan: must begin with a recipe; choose linear_regression_tf|"),
        (["mnist_mlp"], "mnist_mlp: must begin with a recipe; choose linear_regression_tf|"),
        (["mnist_mlp_torch", "ranks=many"], "ranks=many: must be a whole number of at least 1"),
        (["mnist_mlp_torch", "rank=2"], "rank=2: no such key"),
        (["mnist_mlp_torch", *PIPELINE, "ranks=2"], "parallel.pipeline_stages=4: must divide the number of ranks, 2"),
    ],
)
def test_a_mistake_has_its_message(words: Sequence[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        main(words)
    (problem,) = error.value.problems
    assert problem.startswith(message)

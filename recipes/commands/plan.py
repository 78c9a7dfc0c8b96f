"""Says what a run would do, without training: the layers, memory, messages and schedule of each rank.

    python -m recipes plan <recipe> [ranks=N] key=value ...
    python -m recipes plan transformer_lm_torch ranks=4 model=lm_small parallel=pipeline parallel.pipeline_stages=4
    python -m recipes plan mnist_mlp_tf ranks=4 parallel=parameter_server parallel.num_servers=2

The keys are those of the recipe. Without ranks=N, the plan is for the fewest ranks that the configuration allows.
Nothing is computed, no weights are created, and of the data only the tokenizer is used; so the model may be larger than
this computer's memory.
"""

import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

from common.config.composition import compose
from common.config.schema import (
    LanguageConfig,
    LinearDataConfig,
    LMConfig,
    ParallelConfig,
    ParameterServerConfig,
    PipelineConfig,
    ReduceOp,
    RunConfig,
    StageBalance,
    TextConfig,
)
from common.config.validation import validate
from common.data import datasets
from common.data.datasets import tokenizer
from common.data.datasets.text import Text
from common.distributed.topology import Topology
from common.errors import ConfigError
from common.parallel.cost_model import CostModel, LayerProfile, micro_batch_size
from common.parallel.pipeline_schedule import gantt

import numpy as np

RECIPES = Path(__file__).parents[2] / "recipes"
WIDTH = 100  # columns of the output
MB = 1e6


def main(words: Sequence[str]) -> None:
    """Prints the plan.

    Raises:
        ConfigError: there is no such recipe, or its configuration is invalid.
    """
    recipe, overrides = _recipe(words)
    ranks = [word for word in overrides if word.startswith("ranks=")]
    cfg = compose(recipe.rpartition("_")[0], [word for word in overrides if word not in ranks])
    if cfg.train.reproducible:
        raise ConfigError(
            ["train.reproducible=true: has other messages and more memory, which no plan knows; leave it out"]
        )
    num_ranks = _number(ranks[-1]) if ranks else _least_ranks(cfg.parallel)
    topology = validate(cfg, Topology(0, num_ranks, 0, num_ranks))
    plan = CostModel(cfg, topology, _profile(recipe, cfg, topology))
    sys.stdout.write("\n\n".join(["\n".join(section) for section in _sections(recipe, cfg, plan) if section]) + "\n")


def _recipe(words: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The recipe's name and the other words."""
    names = sorted(path.stem for path in RECIPES.glob("[!_]*.py"))
    name, rest = (words[0], words[1:]) if words else ("", [])
    if name not in names:
        raise ConfigError([f"{name or 'plan'}: must begin with a recipe; choose {'|'.join(names)}"])
    return name, rest


def _number(word: str) -> int:
    """The number of ranks."""
    value = word.partition("=")[2]
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError([f"{word}: must be a whole number of at least 1"])
    return int(value)


def _least_ranks(cfg: ParallelConfig) -> int:
    """The smallest number of ranks for the parallelism."""
    if isinstance(cfg, PipelineConfig):
        return max(1, sum(cfg.replicas_per_stage) or cfg.pipeline_stages)
    return 1 + max(1, cfg.num_servers) if isinstance(cfg, ParameterServerConfig) else 1


def _profile(recipe: str, cfg: RunConfig, topology: Topology) -> list[LayerProfile]:
    """The profiles of the recipe's layers, by its framework."""
    module = importlib.import_module(f"recipes.{recipe}")
    profile: ModuleType = importlib.import_module(f"common.{recipe.rpartition('_')[2]}.parallel.profile")
    inputs = _inputs(cfg, micro_batch_size(cfg, topology))
    profiles: list[LayerProfile] = profile.profile_layers(_builder(module, cfg), inputs, cfg.precision)
    return profiles


def _builder(recipe: ModuleType, cfg: RunConfig) -> Callable[[], Any]:
    """The recipe's build_layers with its arguments."""
    sizes: dict[str, Any] = {"cfg": cfg.model}
    if isinstance(cfg.data, LinearDataConfig):
        sizes["num_features"] = cfg.data.num_features
    if isinstance(cfg.data, LanguageConfig) and isinstance(cfg.model, LMConfig):
        sizes["vocabulary_size"] = _vocabulary_size(cfg.data, cfg.model.context)
    names = inspect.signature(recipe.build_layers).parameters
    return lambda: recipe.build_layers(**{name: sizes[name] for name in names})


def _vocabulary_size(cfg: LanguageConfig, context: int) -> int:
    """The vocabulary size of the tokenizer that training would use, which may have to be trained for this."""
    if not isinstance(cfg, TextConfig):
        return datasets.load_text(cfg, context).tokenizer.vocabulary_size
    tokenizer.check_size(cfg.tokenizer, cfg.vocabulary_size, "data.vocabulary_size")
    return Text.open(cfg.path).train_tokenizer(cfg.tokenizer, cfg.vocabulary_size).vocabulary_size


def _inputs(cfg: RunConfig, size: int) -> np.ndarray:
    """Examples (size, ...) of zeros with the right shape and dtype."""
    if isinstance(cfg.model, LMConfig):
        return np.zeros((size, cfg.model.context), np.int64)
    shape = (cfg.data.num_features,) if isinstance(cfg.data, LinearDataConfig) else (28, 28)
    return np.zeros((size, *shape), np.float32)


def _sections(recipe: str, cfg: RunConfig, plan: CostModel) -> Iterator[list[str]]:
    """The lines of each section of the output."""
    yield _heading(recipe, cfg, plan)
    yield _layers(plan)
    yield _partitions(plan)
    yield _memory(plan)
    yield _messages(plan)
    yield _schedule(plan)
    yield [line for note in _notes(cfg, plan) for line in textwrap.wrap(note, WIDTH, subsequent_indent="  ")]


def _heading(recipe: str, cfg: RunConfig, plan: CostModel) -> list[str]:
    topology, size = plan.topology, micro_batch_size(cfg, plan.topology)
    weights = f"{sum(plan.weights.values()):,} parameters in {_count(len(plan.layers), 'layer')}"
    return [
        f"{recipe}: {_count(topology.world_size, 'rank')}, parallel={cfg.parallel.name}, {weights}",
        f"{cfg.train.global_batch_size} examples a step, {_count(topology.num_replicas, 'batch slice')} of "
        f"{_count(cfg.parallel.num_micro_batches, 'micro-batch', 'es')} of {_count(size, 'example')}",
    ]


def _layers(plan: CostModel) -> list[str]:
    """The layers of each model chunk, with its stage and ranks."""
    topology, rows = plan.topology, []
    for chunk, of_chunk in enumerate(plan.ranges):
        stage, parameters = chunk % topology.num_stages, plan.parameters_of_chunk(chunk)
        cells = [str(chunk), str(stage), _span(topology.ranks_of_stage(stage)), _span(of_chunk), f"{parameters:,}"]
        rows.append([*cells, _names([plan.layers[number] for number in of_chunk])])
    # With one chunk per stage, the chunk's number is not shown; with one stage, the stage's number neither.
    skipped = 0 if len(plan.ranges) > topology.num_stages else 1 if topology.num_stages > 1 else 2
    header = ["chunk", "stage", "ranks", "layers", "parameters", ""]
    return _table(header[skipped:], [row[skipped:] for row in rows])


def _names(layers: Sequence[LayerProfile]) -> str:
    """The classes of the layers in order; repetitions are counted."""
    runs = [(name, len(list(run))) for name, run in groupby(layer.name for layer in layers)]
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in runs)


def _partitions(plan: CostModel) -> list[str]:
    """The partition of the weights that each rank updates, if they are sharded."""
    if not plan.owners:
        return []
    who = "server" if plan.topology.num_servers else "rank"
    partitions = [(rank, plan.partition(rank)) for rank in plan.owners]
    rows = [[str(rank), f"{len(mine):,}", f"{mine.start:,}", f"{mine.stop:,}"] for rank, mine in partitions]
    return [
        "The weights as one vector, matrices first, of which each updates a partition",
        *_table([who, "parameters", "from", "to"], rows),
    ]


def _memory(plan: CostModel) -> list[str]:
    """The memory of each rank."""
    ranks = range(plan.topology.world_size)
    rows = _in_mb([plan.memory(rank) for rank in ranks])
    rows["micro-batches held"] = [str(plan.micro_batches_held(rank)) for rank in ranks]
    return ["Memory of a rank, MB", *_by_ranks(rows)]


def _messages(plan: CostModel) -> list[str]:
    """The bytes and messages that each rank sends; empty if no rank sends any."""
    ranks = range(plan.topology.world_size)
    sent, num_messages = [plan.sent(rank) for rank in ranks], [plan.num_messages(rank) for rank in ranks]
    if not any(sum(of_rank.values()) for of_rank in sent):
        return []
    columns = _in_mb(sent)
    if any(num_messages):
        columns["messages"] = list(map(str, num_messages))
    return ["Sent by a rank in a step, MB", *_by_ranks(columns)]


def _schedule(plan: CostModel) -> list[str]:
    """The chart of the schedule and the bubbles, if there are several stages."""
    if plan.topology.num_stages == 1:
        return []
    num_stages = plan.topology.num_stages
    costs = [" + ".join(f"{cost:.2f}" for cost in plan.costs[stage::num_stages]) for stage in range(num_stages)]
    rows = [[str(stage), costs[stage], _percent(plan.bubble(stage))] for stage in range(num_stages)]
    return [
        f"Schedule {plan.rank_schedule.schedule}: F(orward), B(ackward), I(nput's gradient), W(eights' gradient)",
        *gantt(plan.timeline, WIDTH).splitlines(),
        "",
        *_table(["stage", "cost", "bubble"], rows),
        f"In theory, with stages that cost the same, the bubble is {_percent(plan.bubble_in_theory)}.",
    ]


def _notes(cfg: RunConfig, plan: CostModel) -> Iterator[str]:
    """Notes on what the numbers do not include."""
    yield (
        "Activations are an estimate: what backward needs of the micro-batches that are held, without the loss and "
        "without what the framework's allocator keeps."
    )
    for weight, stages in plan.tied.items():
        having = " and ".join(map(str, stages))
        yield f"Stages {having} share a weight of {plan.weights[weight]:,} parameters; each has it."
    for setting in _not_counted(cfg):
        yield f"{setting}: messages and memory are those without it."
    if isinstance(cfg.parallel, PipelineConfig) and cfg.parallel.balance is StageBalance.time:
        yield "parallel.balance=time: layers are measured when training starts; here their parameters stand for it."


def _not_counted(cfg: RunConfig) -> Iterator[str]:
    """The settings whose gradient exchange is not a plain sum."""
    if cfg.compression.name != "none":
        yield f"compression={cfg.compression.name}"
    if cfg.op is ReduceOp.adasum:
        yield "op=adasum"


def _in_mb(of_ranks: Sequence[dict[str, float]]) -> dict[str, list[str]]:
    """A column in MB for each kind of bytes that is not 0 on all ranks, and a column of totals."""
    kinds = dict.fromkeys(kind for of_rank in of_ranks for kind in of_rank)
    kinds_in_use = [kind for kind in kinds if any(of_rank.get(kind) for of_rank in of_ranks)]
    columns = {kind: [of_rank.get(kind, 0) for of_rank in of_ranks] for kind in kinds_in_use}
    columns["total"] = [sum(of_rank.values()) for of_rank in of_ranks]
    return {name: [f"{size / MB:,.2f}" for size in column] for name, column in columns.items()}


def _by_ranks(columns: dict[str, list[str]]) -> list[str]:
    """A table with one row for each run of consecutive ranks with the same cells."""
    rows = list(zip(*columns.values(), strict=True))
    runs = groupby(range(len(rows)), key=rows.__getitem__)
    return _table(["ranks", *columns], [[_span(list(ranks)), *row] for row, ranks in runs])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table with right-aligned columns; a column without a heading is left-aligned and wrapped."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, *rows):
        cells = [cell.rjust(width) if name else cell for cell, width, name in zip(row, widths, header, strict=True)]
        start = "".join(f"{cell}  " for cell in cells[:-1])
        lines += textwrap.wrap(cells[-1], WIDTH, initial_indent=start, subsequent_indent=" " * len(start)) or [start]
    return [line.rstrip() for line in lines]


def _span(numbers: Sequence[int]) -> str:
    """The text for consecutive numbers: first-last."""
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _count(number: int, thing: str, plural: str = "s") -> str:
    return f"{number} {thing}{'' if number == 1 else plural}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"

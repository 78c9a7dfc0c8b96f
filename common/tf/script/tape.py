"""Data-parallel steps with tf.GradientTape in a loop of your own."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common.gradients.gradient_sync import SyncOptions
from common.tf.distributed import runtime
from common.tf.script import checks, noise, probe, statistics
from common.tf.script.ranks import Ranks
from common.tf.script.results import means

import keras
import tensorflow as tf


def data_parallel(
    step: Callable[..., Any],
    model: keras.Model,
    *optimizers: keras.Optimizer,
    metrics: Sequence[keras.Metric] = (),
    compression: str | Mapping[str, Any] = "none",
    op: str = "average",
    seed: int = 0,
) -> Callable[..., Any]:
    """Makes a step of a loop of your own work on all ranks; it becomes a tf.function.

    All ranks call the result with the same global batch. Each runs the step on its rows, and the optimizers use the
    mean gradients over all rows.

    Args:
        step: takes tensors whose first dimension is the batch; computes means over it, and calls optimizer.apply or
            apply_gradients. It returns means over the batch, or nothing.
        model: its weights begin as those of rank 0.
        optimizers: all that the step uses; none for an evaluation.
        metrics: all that the step updates.
        compression: of the gradients: a name of conf/compression/, or {"name": "topk", "ratio": 0.01}.
        op: average or adasum.
        seed: of the compression's random numbers.

    Returns:
        The step, whose values are means over the global batch.

    Raises:
        SystemExit: with status 2 on all ranks at the first call, if the step would not be exact, or changes a variable
            that belongs to none of these; rank 0 prints why.
    """
    topology = runtime.init()
    if topology.world_size == 1:
        return tf.function(step)
    with checks.refusals(topology):
        ranks = Ranks(topology, SyncOptions.from_names(compression, op, seed))
    ranks.wrap(optimizers)
    statistics.use_global_batch(model)

    def variables() -> list[keras.Variable]:
        states = [variable for optimizer in optimizers for variable in optimizer.variables]
        return [*model.variables, *states, *of_metrics, noise.state()]

    def unpacked(rows: Any) -> Any:
        args, kwargs = rows
        return step(*args, **kwargs)

    @tf.function
    def on_ranks(*args: Any, **kwargs: Any) -> Any:
        def averaged(rows: Any) -> Any:
            if optimizers:
                checks.suspect(probe.is_of_whole_batch(unpacked, rows, variables, model), checks.NO_MEANS)
            values = unpacked(rows)
            checks.check_assigned(variables(), "pass data_parallel(metrics=[...])")
            return None if values is None else means(values)

        return ranks.train(averaged, (args, kwargs), lambda: [*statistics.of_ranks(model), *of_metrics])

    of_metrics = [variable for metric in metrics for variable in metric.variables]
    has_begun: list[bool] = []

    @functools.wraps(step)
    def called(*args: Any, **kwargs: Any) -> Any:
        with checks.refusals(topology):
            if not has_begun:
                has_begun.append(True)
                states = [variable for optimizer in optimizers if optimizer.built for variable in optimizer.variables]
                runtime.broadcast_variables([*model.variables, *states])
                checks.begin_epoch()
            return on_ranks(*args, **kwargs)

    return called


def sum_metrics(*metrics: keras.Metric) -> None:
    """Gives all ranks the metrics over the examples of all ranks; to be called before result(), then reset_state()."""
    variables = [variable for metric in metrics for variable in metric.variables]
    statistics.sum_variables(variables, "script.metrics", runtime.init())

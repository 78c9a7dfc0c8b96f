"""Cuts a model into the chunks of a pipeline."""

from collections.abc import Sequence

from common.config.schema import ParallelConfig, PipelineConfig
from common.errors import ConfigError
from common.parallel.partition import balanced, problem, ranges


def cut(cfg: ParallelConfig, num_stages: int, numels: Sequence[int], costs: Sequence[float]) -> list[range]:
    """The numbers of the layers of each model chunk; a pipeline stage has one or several chunks.

    Args:
        cfg: the configuration of the cut.
        num_stages: number of stages; 1: the model is not cut.
        numels: number of values of each layer's weights.
        costs: the cost of each layer, in any unit.

    Raises:
        ConfigError: the model cannot be cut as configured.
    """
    if num_stages == 1 or not isinstance(cfg, PipelineConfig):
        return [range(len(numels))]
    num_chunks, has_weights = num_stages * cfg.virtual_stages_per_rank, [numel > 0 for numel in numels]
    if sum(has_weights) < num_chunks:
        cause = f"parallel.virtual_stages_per_rank={cfg.virtual_stages_per_rank} that is {num_chunks} chunks"
        problem_of_model = (
            f"parallel.pipeline_stages={num_stages}: with {cause}, and the model has {sum(has_weights)} layers with "
            "weights; use fewer, or more layers"
        )
        raise ConfigError([problem_of_model])
    if not cfg.boundaries:
        return ranges(balanced(costs, has_weights, num_chunks), len(numels))
    broken = problem(cfg.boundaries, has_weights, num_chunks)
    if broken:
        given = ",".join(map(str, cfg.boundaries))
        raise ConfigError([f"parallel.boundaries=[{given}]: {broken}; leave it out to have the layers balanced"])
    return ranges(cfg.boundaries, len(numels))

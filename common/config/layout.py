"""How a configuration arranges the ranks of a job, and which subsets of ranks communicate."""

import dataclasses
from collections.abc import Sequence

from common.config.schema import LMConfig, LossyConfig, ParameterServerConfig, PipelineConfig, RunConfig
from common.distributed.topology import Topology


def arranged(topology: Topology, cfg: RunConfig) -> Topology:
    """The topology with the stages, servers or lanes of a configuration.

    Raises:
        ValueError: the stages, servers or lanes do not fit the number of ranks.
    """
    parallel = cfg.parallel
    if cfg.train.reproducible:
        return dataclasses.replace(topology, num_lanes=cfg.train.lanes)
    if isinstance(parallel, PipelineConfig):
        equal = topology.world_size // max(1, parallel.pipeline_stages)
        stages = tuple(parallel.replicas_per_stage) or (equal,) * parallel.pipeline_stages
        return dataclasses.replace(topology, replicas_per_stage=stages)
    if isinstance(parallel, ParameterServerConfig):
        return dataclasses.replace(topology, num_servers=parallel.num_servers)
    return topology


def process_sets(topology: Topology, cfg: RunConfig) -> list[Sequence[int]]:
    """The proper subsets of the ranks that communicate; the same list on every rank."""
    sets: list[Sequence[int]] = []
    is_two_level = isinstance(cfg.compression, LossyConfig) and cfg.compression.two_level
    if is_two_level and topology.local_size < topology.world_size:
        starts = topology.first_ranks_of_hosts
        sets += [*(range(start, start + topology.local_size) for start in starts), starts]
    if topology.num_stages > 1:
        sets += topology.groups
        if isinstance(cfg.model, LMConfig) and cfg.model.tied:
            sets.append(topology.ranks_with_tied_weights((0, topology.num_stages - 1)))
    if topology.num_servers:
        sets.append(topology.servers)
    distinct = {tuple(ranks): ranks for ranks in sets}
    least = 1 if isinstance(cfg.compression, LossyConfig) else 2  # a compressor also runs on a single rank
    return [ranks for ranks in distinct.values() if least <= len(ranks) < topology.world_size]

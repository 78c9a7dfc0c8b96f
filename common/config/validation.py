"""The rules of the configuration that types cannot express."""

import dataclasses
import math
import operator
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.config import failures
from common.config.layout import arranged
from common.config.schema import (
    PIPELINE_SCHEDULES,
    AutoCompressionConfig,
    BatchSchedule,
    CNNConfig,
    DataConfig,
    DGCConfig,
    Dtype,
    ImagesConfig,
    LMConfig,
    LossyConfig,
    MLPConfig,
    MnistConfig,
    ModelConfig,
    OnNonfinite,
    ParameterServerConfig,
    ParameterServerMode,
    PipelineConfig,
    PowerSGDConfig,
    QSGDConfig,
    ReduceOp,
    RunConfig,
    Scope,
    SGDConfig,
    SparseConfig,
    leaves,
    to_dict,
)
from common.distributed.launcher_env import are_hosts_alike
from common.distributed.topology import Topology
from common.errors import ConfigError

_BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], float, str]] = {
    "seed": (operator.ge, 0, "at least 0"),
    "train.epochs": (operator.ge, 1, "at least 1"),
    "train.max_steps": (operator.ge, 1, "at least 1, or null for all epochs"),
    "train.global_batch_size": (operator.ge, 1, "at least 1"),
    "train.clip_norm": (operator.ge, 0, "at least 0; 0 means no clipping"),
    "train.log_every": (operator.ge, 1, "at least 1"),
    "train.checkpoint_every": (operator.ge, 0, "at least 0; 0 means one at the end"),
    "train.commit_every": (operator.ge, 1, "at least 1"),
    "train.keep_checkpoints": (operator.ge, 1, "at least 1"),
    "train.lanes": (operator.ge, 1, "at least 1; 8 is usual"),
    "train.max_batch_size": (operator.ge, 0, "at least 0; 0 means up to the number of examples"),
    "optimizer.lr": (operator.gt, 0, "greater than 0; 0.1 is usual for sgd, 0.001 for adamw"),
    "optimizer.momentum": (operator.ge, 0, "at least 0; 0 means plain gradient descent"),
    "optimizer.beta1": (operator.ge, 0, "at least 0"),
    "optimizer.beta2": (operator.ge, 0, "at least 0"),
    "optimizer.epsilon": (operator.gt, 0, "greater than 0"),
    "optimizer.weight_decay": (operator.ge, 0, "at least 0; 0 means none"),
    "optimizer.freeze_step": (operator.ge, 0, "at least 0; 0 means never"),
    "lr_schedule.warmup_steps": (operator.ge, 0, "at least 0; 0 means none"),
    "lr_schedule.final_fraction": (operator.ge, 0, "at least 0"),
    "data.num_examples": (operator.ge, 1, "at least 1"),
    "data.num_features": (operator.ge, 1, "at least 1"),
    "data.noise": (operator.ge, 0, "at least 0; 0 means none"),
    "data.max_shift": (operator.ge, 0, "at least 0; 0 means none"),
    "data.max_rotation": (operator.ge, 0, "at least 0; 0 means none"),
    "model.dropout": (operator.ge, 0, "at least 0; 0 means none"),
    "model.hidden_size": (operator.ge, 1, "at least 1"),
    "model.num_layers": (operator.ge, 1, "at least 1"),
    "model.num_heads": (operator.ge, 1, "at least 1"),
    "model.width": (operator.ge, 1, "at least 1"),
    "model.context": (operator.ge, 1, "at least 1"),
    "parallel.num_micro_batches": (operator.ge, 1, "at least 1"),
    "parallel.virtual_stages_per_rank": (operator.ge, 1, "at least 1"),
    "parallel.max_staleness": (operator.ge, 0, "at least 0; 0 is sync"),
    "precision.initial_loss_scale": (operator.ge, 1, "at least 1; 65536 is usual"),
    "precision.growth_steps": (operator.ge, 1, "at least 1; 2000 is usual"),
    "compression.min_numel": (operator.ge, 0, "at least 0; 0 compresses all weights"),
    "compression.start_step": (operator.ge, 1, "at least 1"),
    "compression.clip": (operator.ge, 0, "at least 0; 0 means no clipping"),
    "compression.ratio": (operator.gt, 0, "greater than 0; 0.01 is usual"),
    "compression.momentum": (operator.ge, 0, "at least 0; 0 means none"),
    "compression.warmup_steps": (operator.ge, 0, "at least 0; 0 means none"),
    "compression.rank": (operator.ge, 1, "at least 1; 1, 2 and 4 are usual"),
    "compression.min_gain": (operator.ge, 0, "at least 0"),
}
_BELOW_ONE = (
    *("optimizer.momentum", "optimizer.beta1", "optimizer.beta2", "model.dropout"),
    *("compression.momentum", "compression.min_gain"),
)

AUTO_CANDIDATES = ("none", "fp16", "bf16", "int8", "qsgd", "terngrad", "sign", "topk", "randomk", "powersgd")


def validate(cfg: RunConfig, topology: Topology) -> Topology:
    """Checks what types cannot express: bounds, and whether keys suit each other, the ranks and the run folder.

    Returns:
        The topology with the stages or servers of the configuration.

    Raises:
        ConfigError: with all problems found.
    """
    problems = list(_layout_problems(cfg, topology))
    if not problems:
        topology = arranged(topology, cfg)
        problems += _parallel_problems(cfg, topology)
    problems += [
        *_out_of_bounds(cfg),
        *_batch_problems(cfg, topology),
        *_batch_schedule_problems(cfg, topology),
        *_model_problems(cfg.model),
        *_compression_problems(cfg, topology),
        *_data_problems(cfg.data),
        *_resume_problems(cfg, topology),
        *_chaos_problems(cfg),
        *(_run_folder_problems(cfg) if topology.rank == 0 else ()),
    ]
    if problems:
        raise ConfigError(problems)
    return topology


def _layout_problems(cfg: RunConfig, topology: Topology) -> Iterator[str]:
    """The reasons why the ranks cannot be arranged as stages, or as servers and workers."""
    parallel, num_ranks = cfg.parallel, topology.world_size
    if cfg.train.reproducible and not num_ranks <= cfg.train.lanes <= cfg.train.global_batch_size:
        yield (
            f"train.lanes={cfg.train.lanes}: must be at least the number of ranks, {num_ranks}, and at most "
            f"train.global_batch_size={cfg.train.global_batch_size}; change it or horovodrun -np"
        )
    if isinstance(parallel, PipelineConfig):
        stages, replicas = parallel.pipeline_stages, parallel.replicas_per_stage
        if replicas and (len(replicas) != stages or min(replicas) < 1 or sum(replicas) != num_ranks):
            yield (
                f"parallel.replicas_per_stage={_listed(replicas)}: must be one number for each of the "
                f"parallel.pipeline_stages={stages}, which add up to the number of ranks, {num_ranks}; change "
                "them or horovodrun -np"
            )
        elif stages < 1 or (not replicas and num_ranks % stages):
            yield (
                f"parallel.pipeline_stages={stages}: must divide the number of ranks, {num_ranks}; change it or "
                "horovodrun -np, or give the ranks of each stage with parallel.replicas_per_stage"
            )
    if isinstance(parallel, ParameterServerConfig) and not 1 <= parallel.num_servers < num_ranks:
        yield (
            f"parallel.num_servers={parallel.num_servers}: must be at least 1 and leave a worker of {num_ranks} ranks; "
            "change it or start more (horovodrun -np)"
        )


def _parallel_problems(cfg: RunConfig, topology: Topology) -> Iterator[str]:
    parallel = cfg.parallel
    if cfg.elastic:
        yield from _elastic_problems(cfg)
    if cfg.train.reproducible:
        yield from _lane_problems(cfg, topology)
    if isinstance(parallel, PipelineConfig):
        yield from _pipeline_problems(parallel, cfg.train.global_batch_size, topology)
    if isinstance(parallel, ParameterServerConfig):
        yield from _server_problems(parallel, cfg)
    if parallel.name == "data":
        return
    if cfg.optimizer.sharded:
        yield f"optimizer.sharded=true: goes with parallel=data, where all ranks update weights, not {parallel.name}"
    if isinstance(cfg.compression, AutoCompressionConfig):
        yield f"compression=auto: measures parallel=data; with parallel={parallel.name} name a method"
    if isinstance(cfg.compression, LossyConfig) and cfg.compression.two_level:
        yield f"compression.two_level=true: goes with parallel=data, not {parallel.name}; leave it out"
    if cfg.op is ReduceOp.adasum:
        yield f"op=adasum: goes with parallel=data, not {parallel.name}; use op=average"
    if cfg.train.measures_noise:
        yield f"train.batch_schedule=noise_scale: goes with parallel=data, not {parallel.name}; use constant|steps"


def _elastic_problems(cfg: RunConfig) -> Iterator[str]:
    if cfg.parallel.name != "data":
        yield f"elastic=true: goes with parallel=data, not {cfg.parallel.name}; restart such a run by the same command"
    if isinstance(cfg.compression, LossyConfig) and cfg.compression.two_level:
        yield "compression.two_level=true: needs the same hosts all the time; leave it out, or elastic=true"
    if isinstance(cfg.compression, AutoCompressionConfig):
        yield "compression=auto: would choose again whenever ranks change; with elastic=true name a method"


def _lane_problems(cfg: RunConfig, topology: Topology) -> Iterator[str]:
    fewest = cfg.train.lanes // topology.world_size
    if cfg.parallel.name != "data":
        yield f"train.reproducible=true: goes with parallel=data, not {cfg.parallel.name}"
    elif cfg.parallel.num_micro_batches > fewest:
        yield (
            f"parallel.num_micro_batches={cfg.parallel.num_micro_batches}: with train.reproducible=true each lane of a "
            f"rank is a micro-batch, here {fewest}; leave it out, or make train.lanes larger"
        )
    if isinstance(cfg.compression, AutoCompressionConfig):
        yield "compression=auto: would choose by measurements; with train.reproducible=true name a method"
    if isinstance(cfg.compression, LossyConfig) and (cfg.compression.two_level or cfg.compression.health):
        yield "compression.two_level and health: depend on ranks and hosts; leave them out, or train.reproducible"
    if cfg.op is ReduceOp.adasum:
        yield "train.reproducible=true: goes with op=average, not adasum"
    if cfg.optimizer.sharded:
        yield "optimizer.sharded=true: cuts the weights by the number of ranks; leave it out, or train.reproducible"


def _pipeline_problems(parallel: PipelineConfig, batch: int, topology: Topology) -> Iterator[str]:
    if parallel.schedule not in PIPELINE_SCHEDULES:
        yield f"parallel.schedule={parallel.schedule}: must be one of {'|'.join(PIPELINE_SCHEDULES)}"
    elif (parallel.schedule == "interleaved") != (parallel.virtual_stages_per_rank > 1):
        yield (
            f"parallel.virtual_stages_per_rank={parallel.virtual_stages_per_rank}: must be at least 2 with "
            "schedule=interleaved, and 1 with the others"
        )
    per_slice = batch / topology.num_replicas
    if parallel.num_micro_batches >= 1 and per_slice % parallel.num_micro_batches:
        yield (
            f"parallel.num_micro_batches={parallel.num_micro_batches}: must divide the examples of one replica in one "
            f"step, {per_slice:g}; change it or train.global_batch_size"
        )


def _server_problems(parallel: ParameterServerConfig, cfg: RunConfig) -> Iterator[str]:
    name, is_async = cfg.compression.name, parallel.mode is ParameterServerMode["async"]
    if not is_async and parallel.max_staleness:
        yield f"parallel.max_staleness={parallel.max_staleness}: goes with parallel.mode=async; with sync it is 0"
    if isinstance(cfg.compression, LossyConfig) and cfg.compression.health:
        yield "compression.health=true: compares with a sum over all ranks, which parallel=parameter_server has not"
    if name in ("topk", "randomk", "dgc", "powersgd"):
        yield (
            f"compression={name}: is made for sums over all ranks; a push to a server can be compressed with "
            "fp16|bf16|int8|qsgd|terngrad|sign"
        )
    if is_async and cfg.train.on_nonfinite is OnNonfinite.skip:
        yield "train.on_nonfinite=skip: all ranks skip the same step, and async workers are at different ones; use stop"
    if is_async and cfg.precision.compute_dtype is Dtype.float16:
        yield "precision=fp16: all ranks skip the same step, and async workers are at different ones; use bf16|fp32"


def _listed(values: list[int]) -> str:
    """A list as it is written on the command line."""
    return f"[{','.join(map(str, values))}]"


def _out_of_bounds(cfg: RunConfig) -> Iterator[str]:
    values = dict(leaves(dataclasses.asdict(cfg)))
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{key}={value}: must be a finite number; leave it out for the default"
        elif key in _BOUNDS and value is not None and not _BOUNDS[key][0](value, _BOUNDS[key][1]):
            yield f"{key}={value}: must be {_BOUNDS[key][2]}"
        elif key in _BELOW_ONE and value >= 1:
            yield f"{key}={value}: must be below 1"


def _model_problems(cfg: ModelConfig) -> Iterator[str]:
    if isinstance(cfg, MLPConfig) and (not cfg.hidden_sizes or min(cfg.hidden_sizes) < 1):
        yield f"model.hidden_sizes={cfg.hidden_sizes}: must be one or more sizes of at least 1, such as [256,256]"
    if isinstance(cfg, CNNConfig) and not (
        1 <= len(cfg.channels) <= 4 and all(size > 0 and size % 8 == 0 for size in cfg.channels)
    ):
        yield f"model.channels={cfg.channels}: must be one to four multiples of 8, such as [32,64]"
    if isinstance(cfg, LMConfig) and min(cfg.width, cfg.num_heads) > 0 and cfg.width % cfg.num_heads:
        yield f"model.num_heads={cfg.num_heads}: must divide model.width={cfg.width}"


def _compression_problems(cfg: RunConfig, topology: Topology) -> Iterator[str]:
    compression, name = cfg.compression, cfg.compression.name
    if cfg.op is ReduceOp.adasum and name != "none":
        yield f"compression={name}: adasum needs the gradients as they are; use compression=none or op=average"
    if cfg.op is ReduceOp.adasum and cfg.train.measures_noise:
        yield "op=adasum: the gradient noise scale is that of a mean; use train.batch_schedule=constant|steps"
    if name != "none" and cfg.train.measures_noise:
        yield (
            f"compression={name}: train.batch_schedule=noise_scale compares exact gradients; use compression=none, or "
            "train.batch_schedule=constant|steps"
        )
    if name != "none" and cfg.precision.dtype is not Dtype.float32:
        yield f"precision={cfg.precision.name}: compressors work in fp32; use precision=fp32|bf16, or compression=none"
    if "fp16" in (name, *getattr(compression, "candidates", ())) and cfg.precision.compute_dtype is Dtype.float16:
        yield (
            "compression=fp16: with precision=fp16 gradients have been unscaled when they travel, and would vanish in "
            "16 bits below 6e-8, which the loss scale was there to prevent; use compression=bf16 or precision=bf16"
        )
    if isinstance(compression, QSGDConfig) and not 2 <= compression.bits <= 8:
        yield f"compression.bits={compression.bits}: must be 2 to 8; 1 bit is compression=sign"
    if isinstance(compression, SparseConfig) and compression.ratio > 1:
        yield f"compression.ratio={compression.ratio}: must be at most 1, a share of the values"
    if isinstance(compression, DGCConfig):
        yield from _dgc_problems(compression, cfg)
    if isinstance(compression, PowerSGDConfig) and compression.scope is not Scope.layer:
        yield "compression.scope=bucket: powersgd works on the matrix of each layer; use compression.scope=layer"
    if isinstance(compression, LossyConfig) and compression.two_level:
        yield from _two_level_problems(topology)
    if isinstance(compression, AutoCompressionConfig) and not _are_candidates(compression.candidates):
        given = ",".join(compression.candidates)
        yield f"compression.candidates=[{given}]: must be one or more of {','.join(AUTO_CANDIDATES)}"


def _are_candidates(names: list[str]) -> bool:
    return bool(names) and set(names) <= set(AUTO_CANDIDATES)


def _dgc_problems(compression: DGCConfig, cfg: RunConfig) -> Iterator[str]:
    optimizer = cfg.optimizer
    if not compression.error_feedback:
        yield "compression.error_feedback=false: dgc is its residual; use compression=topk to see what it does without"
    if isinstance(optimizer, SGDConfig) and compression.momentum and optimizer.momentum:
        yield (
            f"optimizer.momentum={optimizer.momentum}: dgc has a velocity of its own in its place; leave "
            "compression.momentum out, or use optimizer.momentum=0"
        )
    if compression.momentum and compression.start_step > 1:
        yield (
            f"compression.start_step={compression.start_step}: the steps before would have no momentum, which is in "
            "dgc's velocity; use compression.start_step=1 and compression.warmup_steps, or compression.momentum=0"
        )
    if not isinstance(optimizer, SGDConfig) and compression.momentum:
        yield (
            f"compression.momentum={compression.momentum}: corrects the momentum of SGD; with optimizer="
            f"{optimizer.name} use compression.momentum=0"
        )


def _two_level_problems(topology: Topology) -> Iterator[str]:
    if topology.local_size == topology.world_size:
        yield "compression.two_level=true: all ranks are on one host; start several (horovodrun -H) or leave it out"
    elif not are_hosts_alike():
        yield "compression.two_level=true: all hosts must have as many ranks; change horovodrun -H, or leave it out"


def _batch_schedule_problems(run: RunConfig, topology: Topology) -> Iterator[str]:
    cfg = run.train
    steps, is_given = cfg.batch_growth_steps, cfg.batch_schedule is BatchSchedule.steps
    if is_given != bool(steps) or sorted(set(steps)) != steps or (steps and steps[0] < 1):
        yield (
            f"train.batch_growth_steps={steps}: must be ascending steps such as [100,200] with "
            "train.batch_schedule=steps, and [] otherwise"
        )
    if cfg.batch_schedule is BatchSchedule.noise_scale and topology.num_batch_slices == 1 and not run.elastic:
        yield (
            "train.batch_schedule=noise_scale: compares the gradients of ranks, and there is one; start more "
            "(horovodrun -np 2) or use constant|steps"
        )
    if 0 < cfg.max_batch_size < cfg.global_batch_size:
        yield f"train.max_batch_size={cfg.max_batch_size}: must be 0 or at least train.global_batch_size"


def _chaos_problems(cfg: RunConfig) -> Iterator[str]:
    try:
        failures.parse(cfg.chaos)
    except ConfigError as error:
        yield from error.problems


def _resume_problems(cfg: RunConfig, topology: Topology) -> Iterator[str]:
    source, known = cfg.resume.source, [key for key, _ in leaves(to_dict(cfg))]
    if topology.rank == 0 and source not in ("auto", "never") and not Path(source).is_dir():
        yield f"resume={source}: there is no such checkpoint or run; choose auto|never or the path of a folder"
    for name in cfg.resume.allow_changes:
        if not any(key == name or key.startswith(f"{name}.") for key in known):
            yield f"resume.allow_changes={name}: no such key or group; name keys as they are set, such as optimizer.lr"


def _batch_problems(cfg: RunConfig, topology: Topology) -> Iterator[str]:
    batch, parts = cfg.train.global_batch_size, cfg.parallel.num_micro_batches
    if cfg.train.reproducible:
        return  # the lanes are checked
    if 1 <= batch < topology.num_replicas:
        yield (
            f"train.global_batch_size={batch}: must be at least the number of ranks, {topology.num_replicas}, so that "
            "each has an example; make it larger or start fewer ranks (horovodrun -np)"
        )
    elif parts > max(1, batch // topology.num_replicas) and not isinstance(cfg.parallel, PipelineConfig):
        yield (
            f"parallel.num_micro_batches={parts}: must be at most the examples of one rank in one step, "
            f"{batch // topology.num_replicas}; make it smaller or train.global_batch_size larger"
        )


def _data_problems(cfg: DataConfig) -> Iterator[str]:
    if isinstance(cfg, MnistConfig) and cfg.root is not None and not Path(cfg.root).is_dir():
        yield f"data.root={cfg.root}: there is no such folder; name one that exists, or use data=digits"
    if isinstance(cfg, ImagesConfig) and cfg.max_shift > 14:
        yield f"data.max_shift={cfg.max_shift}: must be at most 14, half of an image"
    if isinstance(cfg, ImagesConfig) and cfg.max_rotation > 180:
        yield f"data.max_rotation={cfg.max_rotation}: must be at most 180 degrees"


def _run_folder_problems(cfg: RunConfig) -> Iterator[str]:
    if cfg.run.dir is None:
        return
    if not cfg.run.dir:
        yield "run.dir=: must name a folder, or be left out for outputs/<recipe>/<date-time>"
        return
    folder = Path(cfg.run.dir)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if (folder / "summary.json").exists():
        yield f"run.dir={folder}: holds a finished run, which is never overwritten; choose another folder or remove it"
    elif not existing.is_dir() or not os.access(existing, os.W_OK):
        yield f"run.dir={folder}: cannot be made, as {existing} is not a writable folder; choose another one"

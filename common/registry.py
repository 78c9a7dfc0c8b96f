"""For which names of options in conf/ there is code, and of which type their configuration must be.

Sources of data and schedules of the learning rate are registered beside their code; other code goes by the type.
"""

from pathlib import Path

from common import config, datasets, learning_rate

NAMES: dict[str, dict[str, type]] = {
    "data": datasets.SOURCES,
    "optimizer": {"adamw": config.AdamWConfig, "gradient_descent": config.SGDConfig, "sgd": config.SGDConfig},
    "lr_schedule": {name: kind for name, (kind, _) in learning_rate.SCHEDULES.items()},
    "precision": {
        **dict.fromkeys(("bf16", "fp32", "fp64"), config.PrecisionConfig),
        "fp16": config.LossScalePrecisionConfig,
    },
    "compression": {
        "auto": config.AutoCompressionConfig,
        "dgc": config.DGCConfig,
        "none": config.CompressionConfig,
        "powersgd": config.PowerSGDConfig,
        "qsgd": config.QSGDConfig,
        "terngrad": config.TernGradConfig,
        **dict.fromkeys(("bf16", "fp16", "int8", "sign"), config.LossyConfig),
        **dict.fromkeys(("randomk", "topk"), config.SparseConfig),
    },
    "parallel": {
        "data": config.ParallelConfig,
        "parameter_server": config.ParameterServerConfig,
        "pipeline": config.PipelineConfig,
    },
}


def suits(group: str, name: str, kind: type) -> bool:
    """Whether there is code for the name, and it takes a configuration of this type; models go by the type alone."""
    if group == "compression" and name in own_compressors():
        return issubclass(kind, config.LossyConfig)
    return group not in NAMES or NAMES[group].get(name) is kind


def own_compressors() -> set[str]:
    """The names of compressors that someone has put beside those that come with the project."""
    modules = Path(__file__).parent.glob("*/compressors/[!_]*.py")
    return {path.stem for path in modules} - NAMES["compression"].keys()

"""The option names of conf/ that have code, and the type of each one's configuration.

Models are chosen by their type alone. tests/config/test_composition.py checks that data sources and schedules have
code.
"""

from pathlib import Path

from common.config import schema

NAMES: dict[str, dict[str, type]] = {
    "data": {
        "digits": schema.ImagesConfig,
        "image_shards": schema.ImageShardsConfig,
        "linear": schema.LinearDataConfig,
        "mnist": schema.MnistConfig,
        "text": schema.TextConfig,
        "text_shards": schema.TextShardsConfig,
    },
    "optimizer": {"adamw": schema.AdamWConfig, "gradient_descent": schema.SGDConfig, "sgd": schema.SGDConfig},
    "lr_schedule": {"constant": schema.LRScheduleConfig, "cosine": schema.CosineConfig},
    "precision": {
        **dict.fromkeys(("bf16", "fp32", "fp64"), schema.PrecisionConfig),
        "fp16": schema.LossScalePrecisionConfig,
    },
    "compression": {
        "auto": schema.AutoCompressionConfig,
        "dgc": schema.DGCConfig,
        "none": schema.CompressionConfig,
        "powersgd": schema.PowerSGDConfig,
        "qsgd": schema.QSGDConfig,
        "terngrad": schema.TernGradConfig,
        **dict.fromkeys(("bf16", "fp16", "int8", "sign"), schema.LossyConfig),
        **dict.fromkeys(("randomk", "topk"), schema.SparseConfig),
    },
    "parallel": {
        "data": schema.ParallelConfig,
        "parameter_server": schema.ParameterServerConfig,
        "pipeline": schema.PipelineConfig,
    },
}


def suits(group: str, name: str, kind: type) -> bool:
    """Whether there is code for the name that accepts this type of configuration; models are chosen by type alone."""
    if group == "compression" and name in own_compressors():
        return issubclass(kind, schema.LossyConfig)
    return group not in NAMES or NAMES[group].get(name) is kind


def own_compressors() -> set[str]:
    """The names of user-defined compressors: modules that were added to the compressors folders."""
    modules = Path(__file__).parent.parent.glob("*/gradients/compressors/[!_]*.py")
    return {path.stem for path in modules} - NAMES["compression"].keys()

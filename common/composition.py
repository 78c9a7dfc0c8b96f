"""Composes a task's configuration from conf/ and the command line, and explains what cannot be applied."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from common import config
from common.config import ConfigError, RunConfig, leaves

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONF = Path(__file__).parent.parent / "conf"
_SHORT = re.compile(r"^(resume)=")
LABELS = (".name", ".dtype", ".compute_dtype")  # keys that come with an option and would lie if they were set alone

_SCHEMAS: dict[str, dict[str, type]] = {
    "": {
        "linear_regression_schema": config.LinearRegressionConfig,
        "mnist_cnn_schema": config.MnistCNNConfig,
        "mnist_mlp_schema": config.MnistMLPConfig,
        "transformer_lm_schema": config.TransformerLMConfig,
    },
    "data": {
        "image_shards_schema": config.ImageShardsConfig,
        "images_schema": config.ImagesConfig,
        "linear_schema": config.LinearDataConfig,
        "mnist_schema": config.MnistConfig,
        "text_schema": config.TextConfig,
        "text_shards_schema": config.TextShardsConfig,
    },
    "model": {
        "cnn_schema": config.CNNConfig,
        "linear_schema": config.LinearConfig,
        "lm_schema": config.LMConfig,
        "mlp_schema": config.MLPConfig,
    },
    "optimizer": {"sgd_schema": config.SGDConfig, "adamw_schema": config.AdamWConfig},
    "lr_schedule": {"constant_schema": config.LRScheduleConfig, "cosine_schema": config.CosineConfig},
    "precision": {
        "loss_scale_schema": config.LossScalePrecisionConfig,
        "precision_schema": config.PrecisionConfig,
    },
    "compression": {
        "auto_schema": config.AutoCompressionConfig,
        "compression_schema": config.CompressionConfig,
        "dgc_schema": config.DGCConfig,
        "lossy_schema": config.LossyConfig,
        "own_schema": config.OwnCompressionConfig,
        "powersgd_schema": config.PowerSGDConfig,
        "qsgd_schema": config.QSGDConfig,
        "sparse_schema": config.SparseConfig,
        "terngrad_schema": config.TernGradConfig,
    },
    "parallel": {
        "parallel_schema": config.ParallelConfig,
        "parameter_server_schema": config.ParameterServerConfig,
        "pipeline_schema": config.PipelineConfig,
    },
}


def group_options(task: str) -> dict[str, list[str]]:
    """The groups of conf/ and the options of each that the task can take."""
    groups = sorted(path for path in CONF.iterdir() if path.is_dir())
    return {group.name: sorted(path.stem for path in group.glob("*.yaml") if _suits(path, task)) for group in groups}


def _suits(option: Path, task: str) -> bool:
    """Whether the schema of an option is of the type that the task has for its group."""
    group = option.parent.name
    schema = _SCHEMAS[group][OmegaConf.load(option).defaults[0]]
    return issubclass(schema, get_type_hints(_SCHEMAS[""][f"{task}_schema"])[group])


def compose(task: str, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a task: conf/<task>.yaml and what it names, changed by the overrides (key=value).

    Raises:
        ConfigError: an override names no key or option, or its value has the wrong type.
    """
    _register_schemas()
    overrides = [_SHORT.sub(r"\1.source=", override) for override in overrides]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        problems = {override: problem for override in overrides if (problem := _refused(task, override))}
        sound = [override for override in overrides if override not in problems]
        try:
            cfg = OmegaConf.to_object(hydra_compose(task, sound))
        except (HydraException, OmegaConfBaseException) as error:
            problems |= _inapplicable(task, sound) or {" ".join(sound): str(error)}
    if problems:
        raise ConfigError([f"{override}: {problem}" for override, problem in problems.items()])
    if not isinstance(cfg, RunConfig):
        raise TypeError(f"conf/{task}.yaml does not start from a schema")
    _move_momentum(cfg)
    return cfg


def _move_momentum(cfg: RunConfig) -> None:
    """Gives deep gradient compression, which keeps a velocity on each rank, the optimizer's momentum."""
    compression, optimizer = cfg.compression, cfg.optimizer
    if isinstance(compression, config.DGCConfig) and compression.momentum is None:
        compression.momentum = 0.0
        if isinstance(optimizer, config.SGDConfig):
            compression.momentum, optimizer.momentum = optimizer.momentum, 0.0


def option(group: str, name: str) -> Any:
    """The configuration of one option of a group of conf/, with its defaults."""
    values = dict(OmegaConf.load(CONF / group / f"{name}.yaml"))
    schema = _SCHEMAS[group][values.pop("defaults")[0]]
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))


def _register_schemas() -> None:
    """Makes the dataclasses known to Hydra under the names that conf/ uses."""
    for group, schemas in _SCHEMAS.items():
        for name, node in schemas.items():
            ConfigStore.instance().store(name=name, node=node, group=group or None)


def _refused(task: str, override: str) -> str | None:
    """Why an override is not even tried: its form, an option that its group lacks, or what only Hydra would take."""
    key, _, value = override.partition("=")
    options = group_options(task).get(key)
    if key.startswith(("+", "~")):
        return "keys cannot be added or removed; write key=value for a key that exists"
    if key.partition("/")[0].partition(".")[0] == "hydra":
        return "Hydra's own settings have no effect here; the folder of a run is set with run.dir"
    if key.endswith(LABELS):
        return f"is set by choosing an option; write {key.partition('.')[0]}={value}"
    if options is not None and value not in options:
        return f"no such option; choose {key}={'|'.join(options)}"
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return "not of the form key=value; quote a value with special characters: 'key=\"value\"'"
    return None


def _inapplicable(task: str, overrides: Sequence[str]) -> dict[str, str]:
    """What is wrong with each override that cannot be applied; the chosen options count before the keys in them."""
    chosen = [override for override in overrides if override.partition("=")[0] in group_options(task)]
    defaults = dict(leaves(OmegaConf.to_container(hydra_compose(task, chosen), enum_to_str=True)))
    problems = {}
    for override in overrides:
        try:
            OmegaConf.to_object(hydra_compose(task, [*chosen, override]))
        except (HydraException, OmegaConfBaseException) as error:
            problems[override] = _cause(task, override.partition("=")[0], defaults, error)
    return problems


def _cause(task: str, key: str, defaults: dict[str, Any], error: Exception) -> str:
    """Why the override of the key failed, and what would do."""
    if key in defaults:
        reason = str(error.__cause__ or error).splitlines()[0]
        default = "null" if defaults[key] is None else defaults[key]
        return f"wrong type: {reason}; the default is {key}={default}"
    group, _, name = key.partition(".")
    having = [
        option
        for option in group_options(task).get(group, ())
        if name in OmegaConf.load(CONF / group / f"{option}.yaml")
    ]
    if having:
        return f"no such key here; it goes with {' or '.join(f'{group}={option}' for option in having)}"
    keys = [known for known in defaults if not known.endswith(LABELS)]
    near = difflib.get_close_matches(key, keys, n=1)
    valid = [known for known in keys if known.startswith(f"{group}.")] or sorted(keys)
    return f"no such key; {f'did you mean {near[0]}? ' if near else ''}valid keys: {', '.join(valid)}"

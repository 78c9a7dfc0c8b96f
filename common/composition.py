"""Composes a task's configuration from conf/ and the command line, and explains what cannot be applied."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from common import config, disk, hints, registry
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


_GROUPS = sorted(group for group in _SCHEMAS if group)


def group_options(task: str) -> dict[str, list[str]]:
    """The groups of conf/ and the options of each that the task can take."""
    return {group: _options(task, group) for group in _GROUPS}


def _options(task: str, group: str) -> list[str]:
    """The options of a group that are sound and of the type that the task has for the group."""
    wanted = get_type_hints(_SCHEMAS[""][f"{task}_schema"])[group]
    paths = sorted((CONF / group).glob("*.yaml"))
    return [path.stem for path in paths if not _unusable(path) and issubclass(_schema(path), wanted)]


def _unusable(path: Path) -> str | None:
    """Why the file of an option cannot be used."""
    group, name = path.parent.name, f"conf/{path.parent.name}/{path.name}"
    try:
        values: Any = OmegaConf.load(path)
        schema, label = _SCHEMAS[group].get(values["defaults"][0]), str(values["name"])
    except Exception as error:  # there is no end to what YAML can hold
        return f"{name}: must be YAML that begins with defaults: [SCHEMA] and name: NAME ({disk.brief(error)})"
    if schema is None:
        return f"{name}: has no known schema in its defaults; choose one of {', '.join(_SCHEMAS[group])}"
    return _without_code(group, label, schema, name)


def _without_code(group: str, label: str, schema: type, name: str) -> str | None:
    """Why an option leads to no code."""
    if registry.suits(group, label, schema):
        return None
    known = registry.NAMES[group]
    if label in known:
        wanted = next(key for key, kind in _SCHEMAS[group].items() if kind is known[label])
        return f"{name}: has name: {label}, which goes with defaults: [{wanted}]"
    own = sorted(registry.own_compressors()) if group == "compression" else []
    remedy = f", or write common/<framework>/compressors/{label}.py" if group == "compression" else ""
    return f"{name}: has name: {label}, for which there is no code; choose {'|'.join([*sorted(known), *own])}{remedy}"


def _schema(path: Path) -> type:
    """The type of an option's configuration."""
    return _SCHEMAS[path.parent.name][OmegaConf.load(path).defaults[0]]


def compose(task: str, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a task: conf/<task>.yaml and what it names, changed by the overrides (key=value).

    Raises:
        ConfigError: an override names no key or option, or its value has the wrong type.
    """
    _register_schemas()
    problems, overrides = hints.split_flags(overrides)
    overrides = [_SHORT.sub(r"\1.source=", override) for override in overrides]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        problems |= {override: problem for override in overrides if (problem := _refused(task, override))}
        sound = [override for override in overrides if override not in problems]
        try:
            cfg = OmegaConf.to_object(hydra_compose(task, sound))
        except (HydraException, OmegaConfBaseException) as error:
            problems |= _inapplicable(task, sound) or {" ".join(sound) or f"conf/{task}.yaml": disk.brief(error)}
    if problems:
        raise ConfigError([f"{override}: {problem}" for override, problem in problems.items()])
    if not isinstance(cfg, RunConfig):
        raise TypeError(f"conf/{task}.yaml does not start from a schema")
    _check_code(cfg)
    _move_momentum(cfg)
    return cfg


def _check_code(cfg: RunConfig) -> None:
    """Raises a ConfigError for options that lead to no code, as those may that conf/<task>.yaml itself names."""
    nodes = {group: getattr(cfg, group) for group in _GROUPS}
    found = [_without_code(group, node.name, type(node), f"{group}={node.name}") for group, node in nodes.items()]
    problems = [problem for problem in found if problem]
    if problems:
        raise ConfigError(problems)


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
    group = key.partition(".")[0]
    if key.startswith(("+", "~")):
        return "keys cannot be added or removed; write key=value for a key that exists"
    if key.partition("/")[0].partition(".")[0] == "hydra":
        return "Hydra's own settings have no effect here; the folder of a run is set with run.dir"
    if key.endswith(LABELS) and group in _GROUPS:
        return f"is set by choosing an option; write {group}={value}"
    if key in _GROUPS and value not in (options := _options(task, key)):
        path = next((path for path in (CONF / key).glob("*.yaml") if path.stem == value), None)
        return (path and _unusable(path)) or f"no such option; choose {key}={'|'.join(options)}"
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return "not of the form key=value; quote a value with special characters: 'key=\"value\"'"
    return None


def _inapplicable(task: str, overrides: Sequence[str]) -> dict[str, str]:
    """What is wrong with each override that cannot be applied; the chosen options count before the keys in them."""
    chosen = [override for override in overrides if override.partition("=")[0] in _GROUPS]
    try:
        defaults = dict(leaves(OmegaConf.to_container(hydra_compose(task, chosen), enum_to_str=True)))
    except (HydraException, OmegaConfBaseException):
        return {}  # not the fault of one override
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
    options = _options(task, group) if group in _GROUPS else []
    having = [option for option in options if name in OmegaConf.load(CONF / group / f"{option}.yaml")]
    if having:
        return f"no such key here; it goes with {' or '.join(f'{group}={option}' for option in having)}"
    if no_key := hints.why_no_key(key):
        return no_key
    keys = [known for known in defaults if not known.endswith(LABELS)]
    near = hints.near(key, keys)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    of_group = [known for known in keys if known.startswith(f"{group}.")]
    if near and not of_group:
        return f"no such key; {meant}--help lists all keys"
    valid = of_group or sorted(keys)
    return f"no such key; {meant}valid keys: {', '.join(valid)}"

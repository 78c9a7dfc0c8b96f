"""Composes a task's configuration from conf/ and the command line, and explains invalid overrides."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from common import file_io
from common.config import hints, registry, schema
from common.config.schema import RunConfig, leaves
from common.errors import ConfigError

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

PACKAGE = Path(__file__).parent.parent
# In a wheel, conf/ is inside the package: a folder conf/ next to the package could belong to another project.
CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())
_SHORT = re.compile(r"^(resume)=")
_QUOTED = re.compile(r"^(chaos)=([^'\"]+)$")  # its signs mean something else to Hydra
LABELS = (".name", ".dtype", ".compute_dtype")  # keys that describe an option and would be wrong if set alone

_SCHEMAS: dict[str, dict[str, type]] = {
    "": {
        "linear_regression_schema": schema.LinearRegressionConfig,
        "mnist_cnn_schema": schema.MnistCNNConfig,
        "mnist_mlp_schema": schema.MnistMLPConfig,
        "transformer_lm_schema": schema.TransformerLMConfig,
    },
    "data": {
        "image_shards_schema": schema.ImageShardsConfig,
        "images_schema": schema.ImagesConfig,
        "linear_schema": schema.LinearDataConfig,
        "mnist_schema": schema.MnistConfig,
        "text_schema": schema.TextConfig,
        "text_shards_schema": schema.TextShardsConfig,
    },
    "model": {
        "cnn_schema": schema.CNNConfig,
        "linear_schema": schema.LinearConfig,
        "lm_schema": schema.LMConfig,
        "mlp_schema": schema.MLPConfig,
    },
    "optimizer": {"sgd_schema": schema.SGDConfig, "adamw_schema": schema.AdamWConfig},
    "lr_schedule": {"constant_schema": schema.LRScheduleConfig, "cosine_schema": schema.CosineConfig},
    "precision": {
        "loss_scale_schema": schema.LossScalePrecisionConfig,
        "precision_schema": schema.PrecisionConfig,
    },
    "compression": {
        "auto_schema": schema.AutoCompressionConfig,
        "compression_schema": schema.CompressionConfig,
        "dgc_schema": schema.DGCConfig,
        "lossy_schema": schema.LossyConfig,
        "own_schema": schema.OwnCompressionConfig,
        "powersgd_schema": schema.PowerSGDConfig,
        "qsgd_schema": schema.QSGDConfig,
        "sparse_schema": schema.SparseConfig,
        "terngrad_schema": schema.TernGradConfig,
    },
    "parallel": {
        "parallel_schema": schema.ParallelConfig,
        "parameter_server_schema": schema.ParameterServerConfig,
        "pipeline_schema": schema.PipelineConfig,
    },
}


_GROUPS = sorted(group for group in _SCHEMAS if group)


def group_options(task: str) -> dict[str, list[str]]:
    """The groups of conf/, each with the options that the task accepts."""
    return {group: _options(task, group) for group in _GROUPS}


def _options(task: str, group: str) -> list[str]:
    """The valid options of a group whose type is the one that the task needs."""
    wanted = get_type_hints(_SCHEMAS[""][f"{task}_schema"])[group]
    paths = sorted((CONF / group).glob("*.yaml"))
    return [path.stem for path in paths if not _unusable(path) and issubclass(_schema(path), wanted)]


def _unusable(path: Path) -> str | None:
    """The problem with an option's file; None if there is none."""
    group, name = path.parent.name, f"conf/{path.parent.name}/{path.name}"
    try:
        values: Any = OmegaConf.load(path)
        schema, label = _SCHEMAS[group].get(values["defaults"][0]), str(values["name"])
    except Exception as error:  # YAML can hold anything, so this can fail in many ways
        return f"{name}: must be YAML that begins with defaults: [SCHEMA] and name: NAME ({file_io.brief(error)})"
    if schema is None:
        return f"{name}: has no known schema in its defaults; choose one of {', '.join(_SCHEMAS[group])}"
    return _without_code(group, label, schema, name)


def _without_code(group: str, label: str, schema: type, name: str) -> str | None:
    """The message if there is no code for an option; None if there is."""
    if registry.suits(group, label, schema):
        return None
    known = registry.NAMES[group]
    if label in known:
        wanted = next(key for key, kind in _SCHEMAS[group].items() if kind is known[label])
        return f"{name}: has name: {label}, which goes with defaults: [{wanted}]"
    own = sorted(registry.own_compressors()) if group == "compression" else []
    remedy = f", or write common/<framework>/gradients/compressors/{label}.py" if group == "compression" else ""
    return f"{name}: has name: {label}, for which there is no code; choose {'|'.join([*sorted(known), *own])}{remedy}"


def _schema(path: Path) -> type:
    """The schema class of an option's file."""
    return _SCHEMAS[path.parent.name][OmegaConf.load(path).defaults[0]]


def compose(task: str, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a task: conf/<task>.yaml and its options, changed by the overrides (key=value).

    Raises:
        ConfigError: an override names an unknown key or option, or its value has the wrong type.
    """
    _register_schemas()
    problems, overrides = hints.split_flags(overrides)
    overrides = [_QUOTED.sub(r"\1='\2'", _SHORT.sub(r"\1.source=", override)) for override in overrides]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        problems |= {override: problem for override in overrides if (problem := _refused(task, override))}
        sound = [override for override in overrides if override not in problems]
        try:
            cfg = OmegaConf.to_object(hydra_compose(task, sound))
        except (HydraException, OmegaConfBaseException) as error:
            problems |= _inapplicable(task, sound) or {" ".join(sound) or f"conf/{task}.yaml": file_io.brief(error)}
    if problems:
        raise ConfigError([f"{override}: {problem}" for override, problem in problems.items()])
    if not isinstance(cfg, RunConfig):
        raise TypeError(f"conf/{task}.yaml does not start from a schema")
    _check_code(cfg)
    _move_momentum(cfg)
    return cfg


def _check_code(cfg: RunConfig) -> None:
    """Raises a ConfigError for options without code; conf/<task>.yaml can name such options, too."""
    nodes = {group: getattr(cfg, group) for group in _GROUPS}
    found = [_without_code(group, node.name, type(node), f"{group}={node.name}") for group, node in nodes.items()]
    problems = [problem for problem in found if problem]
    if problems:
        raise ConfigError(problems)


def _move_momentum(cfg: RunConfig) -> None:
    """Moves the optimizer's momentum to deep gradient compression, which applies it before compression."""
    compression, optimizer = cfg.compression, cfg.optimizer
    if isinstance(compression, schema.DGCConfig) and compression.momentum is None:
        compression.momentum = 0.0
        if isinstance(optimizer, schema.SGDConfig):
            compression.momentum, optimizer.momentum = optimizer.momentum, 0.0


def option(group: str, name: str) -> Any:
    """The configuration of one option of a group of conf/, with its defaults."""
    values = dict(OmegaConf.load(CONF / group / f"{name}.yaml"))
    schema = _SCHEMAS[group][values.pop("defaults")[0]]
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))


def option_names(group: str, without: Sequence[str] = ()) -> list[str]:
    """The names of a group's options in conf/."""
    return sorted({path.stem for path in (CONF / group).glob("*.yaml")} - set(without))


def _register_schemas() -> None:
    """Registers the dataclasses with Hydra under the names that conf/ uses."""
    for group, schemas in _SCHEMAS.items():
        for name, node in schemas.items():
            ConfigStore.instance().store(name=name, node=node, group=group or None)


def _refused(task: str, override: str) -> str | None:
    """The message for an override that is refused before Hydra sees it; None if Hydra may try it.

    Refused are a wrong form, an option that the group lacks, and Hydra's own settings and syntax.
    """
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
    """The problem of each override that cannot be applied; options are applied before the keys in them."""
    chosen = [override for override in overrides if override.partition("=")[0] in _GROUPS]
    try:
        defaults = dict(leaves(OmegaConf.to_container(hydra_compose(task, chosen), enum_to_str=True)))
    except (HydraException, OmegaConfBaseException):
        return {}  # no single override causes the error
    problems = {}
    for override in overrides:
        try:
            OmegaConf.to_object(hydra_compose(task, [*chosen, override]))
        except (HydraException, OmegaConfBaseException) as error:
            problems[override] = _cause(task, override.partition("=")[0], defaults, error)
    return problems


def _cause(task: str, key: str, defaults: dict[str, Any], error: Exception) -> str:
    """Why the override of the key failed, and what the user can write instead."""
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

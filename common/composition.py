"""Composes a task's configuration from conf/ and the command line, and explains what cannot be applied."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common import config
from common.config import ConfigError, RunConfig

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONF = Path(__file__).parent.parent / "conf"

_SCHEMAS: dict[str, dict[str, type]] = {
    "": {"mnist_mlp_schema": config.MnistMLPConfig},
    "data": {"data_schema": config.DataConfig, "mnist_schema": config.MnistConfig},
    "model": {"mlp_schema": config.MLPConfig},
    "optimizer": {"sgd_schema": config.SGDConfig, "adamw_schema": config.AdamWConfig},
    "lr_schedule": {"constant_schema": config.LRScheduleConfig, "cosine_schema": config.CosineConfig},
    "precision": {"precision_schema": config.PrecisionConfig},
    "parallel": {"parallel_schema": config.ParallelConfig},
}


def compose(task: str, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a task: conf/<task>.yaml and what it names, changed by the overrides (key=value).

    Raises:
        ConfigError: an override names no key or option, or its value has the wrong type.
    """
    _register_schemas()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        problems = list(_refused(overrides))
        if not problems:
            try:
                cfg = OmegaConf.to_object(hydra_compose(task, list(overrides)))
            except (HydraException, OmegaConfBaseException) as error:
                problems = list(_explain(task, overrides)) or [str(error)]
    if problems:
        raise ConfigError(problems)
    if not isinstance(cfg, RunConfig):
        raise TypeError(f"conf/{task}.yaml does not start from a schema")
    return cfg


def _register_schemas() -> None:
    """Makes the dataclasses known to Hydra under the names that conf/ uses."""
    for group, schemas in _SCHEMAS.items():
        for name, node in schemas.items():
            ConfigStore.instance().store(name=name, node=node, group=group or None)


def _refused(overrides: Sequence[str]) -> Iterator[str]:
    """One message per override that Hydra may take but the recipes do not."""
    for override in overrides:
        key = override.partition("=")[0]
        if key.startswith(("+", "~")):
            yield f"{override}: keys cannot be added or removed; write key=value for a key that exists"
        elif key.endswith(".name"):
            yield f"{override}: a name cannot be set alone; choose the option with {override.replace('.name=', '=')}"


def _explain(task: str, overrides: Sequence[str]) -> Iterator[str]:
    """One message per override that cannot be applied; the options of groups count before the keys in them."""
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    chosen: list[str] = []
    others: list[str] = []
    for override in overrides:
        key, _, value = override.partition("=")
        try:
            OverridesParser.create().parse_override(override)
        except HydraException:
            yield f"{override}: not of the form key=value; quote a value with special characters: 'key=\"value\"'"
            continue
        options = sorted(path.stem for path in (CONF / key).glob("*.yaml")) if key in groups else []
        if value in options:
            chosen.append(override)
        elif options:
            yield f"{override}: no such option; choose {key}={'|'.join(options)}"
        else:
            others.append(override)
    base = hydra_compose(task, chosen)
    for override in others:
        try:
            OmegaConf.to_object(hydra_compose(task, [*chosen, override]))
        except (HydraException, OmegaConfBaseException) as error:
            yield f"{override}: {_cause(override.partition('=')[0], base, error)}"


def _cause(key: str, cfg: DictConfig, error: Exception) -> str:
    """Why the override of the key failed, and what would do."""
    defaults = dict(_leaves(OmegaConf.to_container(cfg, enum_to_str=True)))
    if key not in defaults:
        near = difflib.get_close_matches(key, defaults, n=1)
        group = key.rpartition(".")[0] or key
        valid = [name for name in defaults if name.startswith(f"{group}.")] or sorted(defaults)
        return f"no such key; {f'did you mean {near[0]}? ' if near else ''}valid keys: {', '.join(valid)}"
    reason = str(error.__cause__ or error).splitlines()[0]
    return f"wrong type: {reason}; the default is {key}={defaults[key]}"


def _leaves(container: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted names and values of all leaves of a nested dict."""
    for name, value in container.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value

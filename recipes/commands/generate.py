"""Goes on with a text, by a language model that was trained with either framework.

    python -m recipes generate run.dir=FOLDER prompt="def " num_tokens=200 temperature=0.8 top_k=40 seed=0

run.dir is the folder of a run of transformer_lm, or one of its checkpoints. framework=torch|tf chooses the framework;
by default the one of the training, if it is installed. temperature=0 takes the most probable token, top_k=0 draws from
all tokens.
"""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

from common import file_io
from common.config.schema import LMConfig
from common.data.datasets import tokenizer
from common.data.datasets.tokenizer import Tokenizer
from common.errors import ConfigError
from common.training import checkpoint_files, sampling
from common.training.checkpoint_files import Checkpoint
from recipes.commands import parse

import numpy as np
from omegaconf import MISSING

MODULES = {"torch": "torch", "tf": "tensorflow"}


@dataclass
class Arguments:
    """The arguments of the command."""

    run_dir: str = MISSING
    prompt: str = "\n"
    num_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 40
    seed: int = 0
    framework: str | None = None


def main(words: Sequence[str]) -> None:
    """Writes the prompt and the generated text to stdout, token by token."""
    arguments = parse(Arguments, words)
    _check(arguments)
    found = checkpoint_files.find(Path(arguments.run_dir))
    if found.state["task"] != "transformer_lm":
        raise ConfigError([f"run.dir={arguments.run_dir}: is of {found.state['task']}; only transformer_lm generates"])
    tokens = _tokenizer(found)
    ids = tokens.encode(arguments.prompt)
    decoder = _decoder(found, arguments.framework, tokens.vocabulary_size)
    random = np.random.default_rng(arguments.seed)
    stream = tokenizer.Stream(tokens)
    sys.stdout.write(arguments.prompt)
    for _ in range(arguments.num_tokens):
        logits = decoder.feed(ids)
        if not np.isfinite(logits).all():
            raise ConfigError([f"{found.folder}: its weights give no finite numbers; use another checkpoint"])
        choice = sampling.choose(logits, arguments.temperature, arguments.top_k, random)
        sys.stdout.write(stream.add(choice))
        sys.stdout.flush()
        ids = np.array([choice])
    sys.stdout.write(stream.rest() + "\n")


def _check(arguments: Arguments) -> None:
    """Raises a ConfigError for invalid arguments."""
    problems = []
    if not arguments.prompt or not _is_text(arguments.prompt):
        problems.append(f"prompt={arguments.prompt!r}: must be one character or more, in UTF-8")
    for name in ("num_tokens", "temperature", "top_k", "seed"):
        value = getattr(arguments, name)
        if not 0 <= value < float("inf"):
            problems.append(f"{name}={value}: must be at least 0")
    if arguments.framework is not None and not _is_installed(arguments.framework):
        problems.append(f"framework={arguments.framework}: must be torch|tf, and installed; leave it out for either")
    if problems:
        raise ConfigError(problems)


def _tokenizer(found: Checkpoint) -> Tokenizer:
    try:
        return tokenizer.from_json(found.state.get("tokenizer"))
    except ValueError as error:
        raise ConfigError([f"{found.folder}: is no sound checkpoint: {file_io.brief(error)}"]) from error


def _sizes(found: Checkpoint, vocabulary_size: int) -> LMConfig:
    """The model's sizes, checked against the largest weights, so that the model needs no more memory than these."""
    sizes, kinds = found.state["config"].get("model"), get_type_hints(LMConfig)
    if isinstance(sizes, dict) and {name: type(size) for name, size in sizes.items()} == kinds:
        cfg = LMConfig(**sizes)
        if 1 <= cfg.num_layers <= len(found.weights) and 1 <= cfg.num_heads <= cfg.width and 0 <= cfg.dropout < 1:
            shapes = {"0.token.weight": (vocabulary_size, cfg.width), "0.position.weight": (cfg.context, cfg.width)}
            shapes |= {f"{layer + 1}.mlp.hidden.weight": (4 * cfg.width, cfg.width) for layer in range(cfg.num_layers)}
            found_shapes = {name: array.shape for name, array in found.weights.items()}
            if shapes.items() <= found_shapes.items() and cfg.width % cfg.num_heads == 0:
                return cfg
    raise ConfigError([f"{found.folder}: is no sound checkpoint: its model's sizes are not those of its weights"])


def _decoder(found: Checkpoint, framework: str | None, vocabulary_size: int) -> Any:
    """The model of the checkpoint, in the chosen framework, else the one of the training, else an installed one."""
    cfg = _sizes(found, vocabulary_size)
    candidates = [framework] if framework else [found.state["framework"], *MODULES]
    chosen = next(name for name in candidates if _is_installed(name))
    recipe = importlib.import_module(f"recipes.transformer_lm_{chosen}")
    generation = importlib.import_module(f"common.{chosen}.training.generation")
    return generation.restored_decoder(recipe.build_layers(cfg, vocabulary_size), cfg, found.weights)


def _is_text(prompt: str) -> bool:
    """Whether the prompt was valid UTF-8 on the command line; Python keeps other bytes as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in prompt)


def _is_installed(framework: str) -> bool:
    return framework in MODULES and find_spec(MODULES[framework]) is not None

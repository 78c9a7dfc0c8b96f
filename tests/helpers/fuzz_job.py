"""Reads files that were changed in many ways: for tests/data/test_fuzz.py.

python -m tests.helpers.fuzz_job READER NUMBER FOLDER

In a process of its own, as its memory is limited and what it opens is watched, both of which stay so.
"""

import copy
import gzip
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from common.config.composition import compose
from common.config.schema import (
    Balance,
    ImageShardsConfig,
    TextConfig,
    TextShardsConfig,
    TokenizerKind,
    Verify,
    leaves,
    to_dict,
)
from common.data import datasets, example_log
from common.data.datasets import mnist, shards, tokenizer
from common.data.sampler import TrainingSampler
from common.distributed.topology import Topology
from common.errors import ConfigError
from common.training import checkpoint_files, metrics_file
from recipes.commands import generate, shard_data
from tests.helpers.idx import write_idx
from tests.helpers.ledger import note

import numpy as np

SECONDS = 2  # for one mutant
MEMORY = 256 << 20  # for all
LONGEST_MESSAGE = 2000
SPECIAL = 0.05  # share of the mutants that are no regular file, or a link
ALONE = Topology(0, 1, 0, 1)
NUMBERS = (0, 1, -1, 7, 255, 256, 1 << 31, (1 << 31) - 1, 1 << 48, 1 << 63, 10**30, 10**400)


class Late(BaseException):
    """A mutant takes too long; nothing that readers catch."""


@dataclass
class Target:
    """Files that belong together and what reads them.

    Attributes:
        folder: of the files.
        names: of those that are changed.
        read: the reader, and what uses its result.
        sign: makes hashes in other files fit to a changed one.
    """

    folder: Path
    names: Sequence[str]
    read: Callable[[random.Random], object]
    sign: Callable[[str], object] = lambda _: None


def changed_bytes(dice: random.Random, content: bytes) -> bytes:
    """Some bytes flipped, cut off, put in, doubled, or made an integer that is on the edge of something."""
    start, length = dice.randrange(len(content) + 1), dice.choice((1, 2, 8, 64, 1000))
    end = start + length
    match dice.randrange(6):
        case 0:
            flipped = bytearray(content)
            for _ in range(dice.choice((1, 1, 4))):
                flipped[dice.randrange(len(flipped))] ^= 1 << dice.randrange(8)
            return bytes(flipped)
        case 1:
            return content[:start]
        case 2:
            return content[:start] + dice.randbytes(length) + content[start:]
        case 3:
            return content[:end] + content[start:]
        case 4:
            return content[:start] + content[end:]
    edge = dice.choice((0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF))
    return content[:start] + edge.to_bytes(4, dice.choice(("big", "little"))) + content[start + 4 :]


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def places_in(root: Any) -> list[tuple[Any, Any]]:
    """Each value within JSON, as its container and its key or number there, outer ones first."""
    places: list[tuple[Any, Any]] = [(root, key) for key in root]
    for container, key in places:  # grows while it is walked through
        value = container[key]
        keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        places += [(value, inner) for inner in keys]
    return places


def other_value(dice: random.Random, value: Any) -> Any:
    """Something that is not what was there."""
    names = ("", "x", "../outside", "..", "/etc/passwd", "a\0b", "\ud800", "x" * 5000, "\n\x1b[2J")
    others: tuple[Any, ...] = (None, True, [], {}, [value], {"x": value}, nested(90), nested(900), str(value))
    numbers = (dice.choice(NUMBERS), -dice.choice(NUMBERS), -1.5, float("nan"), float("inf"))
    return dice.choice(dice.choice((names, others, numbers)))


def changed_json(dice: random.Random, content: bytes) -> bytes:
    """JSON in which a value is another one, of another type, one from elsewhere, gone, or has another name."""
    root = {"root": json.loads(content)}
    places = places_in(root)
    container, key = dice.choice(places[: dice.choice((8, 40, len(places)))])
    match dice.randrange(6):
        case 0 if container is not root:
            del container[key]
        case 1 if isinstance(container, dict):
            container[dice.choice(("other", "\ud800"))] = container.pop(key)
        case 2 if isinstance(container[key], str):
            container[key] = f"../outside/{container[key]}"
        case 3:
            other, there = dice.choice(places)
            container[key] = copy.deepcopy(other[there])
        case _:
            container[key] = other_value(dice, container[key])
    try:
        text = json.dumps(next(iter(root.values())))
    except RecursionError:
        text = "[" * 5000 + "]" * 5000
    return text.replace('"x"', "9" * 5000).encode() if dice.random() < 0.1 else text.encode()


def changed_line(dice: random.Random, content: bytes) -> bytes:
    lines = content.splitlines()
    number = dice.randrange(len(lines))
    lines[number] = changed_json(dice, lines[number])
    return b"\n".join(lines) + b"\n"


def changed_header(dice: random.Random, content: bytes) -> bytes:
    """A safetensors file with another header, whose length is right."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = changed_json(dice, content[8:end])
    return len(header).to_bytes(8, "little") + header + content[end:]


@cache
def bomb() -> bytes:
    """4 GiB of zeros, which take longer to unpack than there is time."""
    return gzip.compress(bytes(64 << 20)) * 64


def changed_inside(dice: random.Random, content: bytes) -> bytes:
    """A gzip file of changed contents, or of more than its header promises."""
    return content + bomb() if dice.random() < 0.05 else gzip.compress(changed_bytes(dice, gzip.decompress(content)))


BY_ENDING = {
    ".json": changed_json,
    ".jsonl": changed_line,
    ".safetensors": changed_header,
    ".gz": changed_inside,
}


def put_special(dice: random.Random, path: Path, outside: Path) -> None:
    """A FIFO, a folder, a device, or a link in the place of a file; outside/<name> has the file's contents."""
    match dice.randrange(6):
        case 0:
            os.mkfifo(path)
        case 1:
            path.mkdir()
        case 2:
            path.symlink_to("/dev/zero")
        case 3:
            path.symlink_to(path)
        case 4:
            path.symlink_to(outside / path.name)
        case 5:
            path.symlink_to("/etc/hostname")


def put_mutant(dice: random.Random, target: Target, name: str, content: bytes) -> None:
    """Puts a changed file in the place of one."""
    path = target.folder / name
    if dice.random() < SPECIAL:
        path.unlink()
        put_special(dice, path, target.folder.parent / "outside")
        return
    is_aware = path.suffix in BY_ENDING and dice.random() < 0.6
    path.write_bytes((BY_ENDING[path.suffix] if is_aware else changed_bytes)(dice, content))
    if dice.random() < 0.5:
        # Not in a file in which there is nothing to put a hash into.
        with suppress(ValueError, RecursionError, LookupError, TypeError, AttributeError):
            target.sign(name)


def restore(target: Target, contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        path = target.folder / name
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        elif not path.is_file() or path.is_symlink():
            path.unlink(missing_ok=True)
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)


def misread(target: Target, dice: random.Random) -> str | None:
    """What is wrong with how a mutant is read; None: it is read, or refused with a message."""
    start = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        target.read(dice)
    except ConfigError as error:
        for problem in error.problems:
            if not problem.isprintable() or len(problem) > LONGEST_MESSAGE:
                return f"the message is not one line: {problem[:300]!r}"
    except Late:
        return f"not finished after {SECONDS} s"
    except BaseException as error:
        place = error.__traceback__
        while place and place.tb_next:
            place = place.tb_next
        where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else ""
        return f"{type(error).__name__} at {where}: {str(error)[:200]!r}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.monotonic() - start
    return f"took {seconds:.1f} s" if seconds > SECONDS else None


def watch(target: Target, opened: list[str]) -> None:
    """Notes what is opened outside the folder, by whatever name; Python's own modules are not meant."""
    own = (str(target.folder), sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str | bytes):
            return
        path = os.path.abspath(os.fsdecode(arguments[0]))
        real = os.path.realpath(path) if path.endswith(".bin") else path  # shards have the names that the index gives
        if not real.startswith(own):
            opened.append(path)

    sys.addaudithook(hook)


def write_shards(folder: Path, source: Sequence[str]) -> dict[str, Any]:
    shard_data.main([*source, f"out={folder}"])
    index: dict[str, Any] = json.loads((folder / shards.INDEX).read_bytes())
    return index


def sign_shards(folder: Path, name: str) -> None:
    """Gives the index the SHA-256 of a shard, and its own."""
    index = json.loads((folder / shards.INDEX).read_bytes())
    if name != shards.INDEX:
        for part in index["parts"].values():
            for field in part["fields"].values():
                for shard in field["shards"]:
                    if shard["file"] == name:
                        shard["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    index["sha256"] = shards._content_sha256(index)
    (folder / shards.INDEX).write_text(json.dumps(index))


def of_image_shards(folder: Path) -> Target:
    idx, out = folder / "idx", folder / "data"
    of_idx(folder)
    (folder / "data").rename(idx)
    write_shards(out, ["source=idx", f"path={idx}", f"shard_bytes={7 * 784}"])

    def read(dice: random.Random) -> None:
        cfg = ImageShardsConfig("image_shards", False, Balance.none, 0, 0.0, str(out), dice.choice(list(Verify)))
        datasets.prepare(cfg, ALONE)
        for split in datasets.load_images(cfg):
            split.classes[:]
            split.get_batch(np.array([0, len(split) - 1]))

    names = [shards.INDEX] * 8 + [path.name for path in sorted(out.glob("*.bin"))]
    return Target(out, names, read, lambda name: sign_shards(out, name))


def of_text_shards(folder: Path) -> Target:
    (folder / "words").write_text("words and more words " * 50)
    out = folder / "data"
    source = ["source=text", f"path={folder / 'words'}", "tokenizer=bpe", "vocabulary_size=260", "shard_bytes=300"]
    write_shards(out, source)

    def read(dice: random.Random) -> None:
        cfg = TextShardsConfig("text_shards", False, str(out), dice.choice(list(Verify)))
        datasets.prepare(cfg, ALONE)
        corpus = datasets.load_text(cfg, 8)
        for windows in (corpus.train, corpus.test):
            inputs, _ = windows.get_batch(np.array([0, len(windows) - 1]))
            corpus.tokenizer.decode(inputs.ravel().tolist())
        corpus.tokenizer.encode("other words")

    names = [shards.INDEX] * 12 + [path.name for path in sorted(out.glob("*.bin"))]
    return Target(out, names, read, lambda name: sign_shards(out, name))


def of_idx(folder: Path) -> Target:
    out, numbers = folder / "data", np.random.default_rng(0)
    out.mkdir()
    for prefix, size, ending in (("train", 20, ".gz"), ("t10k", 10, "")):
        write_idx(out / f"{prefix}-images-idx3-ubyte{ending}", numbers.integers(0, 255, (size, 28, 28), np.uint8))
        write_idx(out / f"{prefix}-labels-idx1-ubyte{ending}", numbers.integers(0, 10, size, np.uint8))
    return Target(out, sorted(path.name for path in out.iterdir()), lambda _: mnist.load(str(out)))


def of_text(folder: Path) -> Target:
    out = folder / "data"
    out.mkdir()
    for name in ("a", "b"):
        (out / name).write_text("Wörter und mehr Wörter " * 20)

    def read(dice: random.Random) -> None:
        datasets.load_text(TextConfig("text", False, str(out), dice.choice(list(TokenizerKind)), 260), 8)

    return Target(out, ["a", "b"], read)


def of_checkpoint(folder: Path) -> Target:
    tokens = tokenizer.train(TokenizerKind.bpe, ["words and more words " * 50], 260)
    sizes = ["model.num_layers=1", "model.width=4", "model.num_heads=2", "model.context=8"]
    cfg = compose("transformer_lm", [*sizes, "train.batch_schedule=noise_scale"])
    zeros = {
        **{"0.token.weight": (tokens.vocabulary_size, 4), "0.position.weight": (8, 4)},
        **{
            f"{name}.{leaf}": (4,)
            for name in ("1.attention_norm", "1.mlp_norm", "2.norm")
            for leaf in ("weight", "bias")
        },
        **{"1.attention.qkv.weight": (12, 4), "1.attention.qkv.bias": (12,)},
        **{"1.attention.projection.weight": (4, 4), "1.attention.projection.bias": (4,)},
        **{"1.mlp.hidden.weight": (16, 4), "1.mlp.hidden.bias": (16,)},
        **{"1.mlp.projection.weight": (4, 16), "1.mlp.projection.bias": (4,)},
    }
    weights = {name: np.zeros(shape, np.float32) for name, shape in zeros.items()}
    state = {
        "task": "transformer_lm",
        "framework": "torch",
        "fingerprint": "abc",
        "config": to_dict(cfg),
        "versions": {},
        "tokenizer": tokens.to_json(),
        "position": {"step": 3, "epoch": 1, "offset": 36},
        "batch_sizes": {"changes": [[1, 12]], "noise": 0.0, "signal": 0.0},
        "world_size": 2,
    }
    out = folder / "data"
    checkpoint_files.write(out, weights, {"0.token.weight.momentum": weights["0.token.weight"]}, {}, state)

    def read(_: random.Random) -> None:
        found = checkpoint_files.find(out)
        plan = TrainingSampler.from_config(cfg, 100, ALONE, found.state)
        plan.progress(plan.start)
        plan.batch_sizes.at(plan.start.step + 1)
        dict(leaves(found.state["config"]))
        tokens = generate._tokenizer(found)
        tokens.decode(tokens.encode("words and others").tolist())
        generate._sizes(found, tokens.vocabulary_size)

    def sign(name: str) -> None:
        state = json.loads((out / checkpoint_files.STATE).read_bytes())
        if name != checkpoint_files.STATE:
            state["sha256"][name] = hashlib.sha256((out / name).read_bytes()).hexdigest()
        state["sha256"][checkpoint_files.STATE] = checkpoint_files.state_sha256(state)
        (out / checkpoint_files.STATE).write_text(json.dumps(state))

    names = [checkpoint_files.STATE] * 3 + [
        checkpoint_files.WEIGHTS,
        checkpoint_files.OPTIMIZER,
        checkpoint_files.GRADIENTS,
    ]
    return Target(out, names, read, sign)


def of_ledger(folder: Path) -> Target:
    note(folder / "data", 2, stop=7)
    note(folder / "data", 1, start=6)

    def read(dice: random.Random) -> None:
        list(example_log.check(folder / "data"))

    return Target(folder / "data" / "ledger", sorted(path.name for path in folder.glob("data/ledger/*")), read)


def of_metrics(folder: Path) -> Target:
    out = folder / "data"
    out.mkdir()
    events = [{"step": step, "epoch": 1, "train_loss": 1 / step, "wall_seconds": 0.5} for step in range(1, 20)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))

    def read(_: random.Random) -> None:
        try:
            found, problems = metrics_file.read(out / "metrics.jsonl")
        except ConfigError as error:
            raise ValueError("a run must go on with what is left of its record") from error
        json.dumps([found, problems])

    return Target(out, ["metrics.jsonl"], read)


READERS = {
    "image_shards": of_image_shards,
    "text_shards": of_text_shards,
    "idx": of_idx,
    "text": of_text,
    "checkpoint": of_checkpoint,
    "ledger": of_ledger,
    "metrics": of_metrics,
}


def late(*_: object) -> None:
    raise Late


def main(reader: str, number: int, folder: Path) -> None:
    """Reads so many mutants; prints what is wrong with each that is neither read nor refused with a message."""
    target = READERS[reader](folder)
    shutil.copytree(target.folder, folder / "outside", dirs_exist_ok=True)
    target.read(random.Random(0))  # unchanged; imports what is needed
    contents = {path.name: path.read_bytes() for path in target.folder.iterdir()}
    signal.signal(signal.SIGALRM, late)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, resource.RLIM_INFINITY))
    opened: list[str] = []
    watch(target, opened)
    wrong = 0
    for seed in range(number):
        dice = random.Random(f"{reader} {seed}")
        name = dice.choice(target.names)
        put_mutant(dice, target, name, contents[name])
        opened.clear()
        problem = misread(target, dice) or (opened and f"reads {opened[0]}")
        if problem:
            wrong += 1
            print(f"{reader} {seed}, {name}: {problem}", flush=True)
        restore(target, contents)
    print(f"{number} mutants, {wrong} misread")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))

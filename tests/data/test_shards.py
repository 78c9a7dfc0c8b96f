"""The format for data that does not fit in memory, and the command that writes it."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.config.schema import (
    Balance,
    ImageShardsConfig,
    MnistConfig,
    TextConfig,
    TextShardsConfig,
    TokenizerKind,
    Verify,
)
from common.data import datasets
from common.data.datasets import digits, mnist, shards, text
from common.data.datasets.shards import ShardedArray, ShardWriter
from common.distributed.topology import Topology
from common.errors import ConfigError
from recipes.commands import shard_data
from tests.helpers.idx import write_idx
from tests.helpers.launch import ROOT

import numpy as np
import pytest

ALONE = Topology(0, 1, 0, 1)
NUM_TRAIN, NUM_TEST = 50, 20


def text_config(path: Path | str | None, verify: Verify = Verify.hash) -> TextShardsConfig:
    return TextShardsConfig("text_shards", False, None if path is None else str(path), verify)


def image_config(path: Path, verify: Verify = Verify.hash) -> ImageShardsConfig:
    return ImageShardsConfig("image_shards", False, Balance.none, 0, 0.0, str(path), verify)


@pytest.fixture
def idx(tmp_path: Path) -> Path:
    """A folder of four IDX files."""
    folder = tmp_path / "idx"
    folder.mkdir()
    for prefix, split, size, end in (
        ("train", digits.load()[0], NUM_TRAIN, ".gz"),
        ("t10k", digits.load()[1], NUM_TEST, ""),
    ):
        write_idx(folder / f"{prefix}-images-idx3-ubyte{end}", split.images[:size])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{end}", split.classes[:size])
    return folder


@pytest.fixture
def images(idx: Path, tmp_path: Path) -> Path:
    """The same as shards of 7 images, and of all classes."""
    shard_data.main(["source=idx", f"path={idx}", f"out={tmp_path / 'images'}", f"shard_bytes={7 * 784 + 5}"])
    return tmp_path / "images"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A text of 1,000 bytes as shards of 70 tokens."""
    (tmp_path / "words").write_text("words and " * 100)
    shard_data.main(["source=text", f"path={tmp_path / 'words'}", f"out={tmp_path / 'tokens'}", "shard_bytes=70"])
    return tmp_path / "tokens"


@pytest.mark.parametrize("kind", list(TokenizerKind))
@pytest.mark.parametrize("shard_bytes", [9973, 100003, 1 << 26])
def test_sharded_text_is_the_text_in_memory(tmp_path: Path, kind: TokenizerKind, shard_bytes: int) -> None:
    arguments = [f"tokenizer={kind.name}", "vocabulary_size=300", f"shard_bytes={shard_bytes}"]
    shard_data.main(["source=text", "path=null", f"out={tmp_path / 'out'}", *arguments])
    cfg = text_config(tmp_path / "out")
    datasets.prepare(cfg, ALONE)
    sharded = datasets.load_text(cfg, 64)
    memory = datasets.load_text(TextConfig("text", False, None, kind, 300), 64)
    assert sharded.tokenizer.to_json() == memory.tokenizer.to_json()
    for one, other in ((sharded.train, memory.train), (sharded.test, memory.test)):
        assert np.array_equal(one.tokens[:], other.tokens[:])
        assert (one.fingerprint, one.num_bytes, len(one)) == (other.fingerprint, other.num_bytes, len(other))
        chosen = np.random.default_rng(0).permutation(len(one))[:50]
        for some, same in zip(one.get_batch(chosen), other.get_batch(chosen), strict=True):
            assert np.array_equal(some, same)
    assert sharded.train.fingerprint != sharded.test.fingerprint


def test_sharded_images_are_the_images_in_memory(idx: Path, images: Path) -> None:
    datasets.prepare(image_config(images), ALONE)
    memory = datasets.load_images(MnistConfig("mnist", False, Balance.none, 0, 0.0, str(idx)))
    for one, other in zip(datasets.load_images(image_config(images)), memory, strict=True):
        assert one.fingerprint == other.fingerprint
        assert len(one) == len(other)
        for chosen in (np.array([19, 0, 7, 7, 6]), slice(3, 18)):
            for some, same in zip(one.get_batch(chosen), other.get_batch(chosen), strict=True):
                assert (some.dtype, some.tolist()) == (same.dtype, same.tolist())
    assert len(list(images.glob("train-images-*.bin"))) == 8
    assert len(list(images.glob("train-classes-*.bin"))) == 1


def test_the_fingerprint_tells_shapes_dtypes_and_fields_apart() -> None:
    array = np.arange(6, dtype=np.uint8)
    prints = {
        datasets.fingerprint.fingerprint(**fields)
        for fields in ({"a": array}, {"b": array}, {"a": array.view(np.uint16)}, {"a": array.reshape(2, 3)})
    }
    assert len(prints) == 4


def written(folder: Path, array: np.ndarray, shard_bytes: int) -> ShardedArray:
    with ShardWriter(str(folder), shard_bytes) as writer:
        for part in text.PARTS:
            for block in np.array_split(array, 3):
                writer.add(part, "tokens", block)
        index = writer.finish("text", {"train": 1, "test": 1})
    return ShardedArray(folder, index.parts["train"].fields["tokens"])


@pytest.mark.parametrize("shard_bytes", [1, 8, 14, 200, 201, 1000])
def test_a_sharded_array_is_indexed_as_one_in_memory(tmp_path: Path, shard_bytes: int) -> None:
    memory = np.random.default_rng(0).integers(0, 1000, 100).astype(np.uint16)
    array = written(tmp_path / "out", memory, shard_bytes)
    assert (array.shape, array.dtype, len(array)) == (memory.shape, memory.dtype, 100)
    choices: list[Any] = [slice(None), slice(5, 5), slice(9, 3), slice(-7, None), slice(3, 95, 7), slice(90, 2, -4)]
    choices += [
        np.array([[99, 0, 3], [50, 50, -1]]),
        np.array([], np.int64),
        np.array(4),
        np.arange(24).reshape(2, 3, 4),
    ]
    for chosen in choices:
        assert np.array_equal(array[chosen], memory[chosen])
        assert array[chosen].shape == memory[chosen].shape
    for wrong in (np.array([100]), np.array([-101]), np.array([True, False]), np.array([0.5])):
        with pytest.raises(IndexError):
            array[wrong]


def test_only_the_shards_that_are_asked_for_are_opened(tokens: Path) -> None:
    corpus = datasets.load_text(text_config(tokens), 10)
    for path in tokens.glob("train-tokens-*.bin"):
        if path.name != "train-tokens-00002.bin":
            path.unlink()
    assert corpus.train.get_batch(np.array([14]))[0].shape == (1, 10)
    with pytest.raises(ConfigError, match=r"train-tokens-00000\.bin is missing"):
        corpus.train.get_batch(np.array([0]))


def changed_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def fifo_instead(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link_instead(path: Path) -> None:
    """Moves a shard out of the folder and links to it."""
    path.symlink_to(path.rename(path.parent.parent / path.name))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "is missing; copy the folder again"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 69 bytes instead of 70: it is damaged, or"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "has 71 bytes instead of 70"),
    "changed": (
        changed_byte,
        "has other contents than the SHA-256 in index.json: it is damaged, or index.json belongs",
    ),
    "folder": (folder_instead, "cannot be read (is not a regular file)"),
    "FIFO": (fifo_instead, "cannot be read (is not a regular file)"),
    "link": (link_instead, "cannot be read (is a link that leads out of the folder)"),
}


@pytest.mark.parametrize("how", [Verify.size, Verify.hash])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_by_the_rank_whose_shard_it_is(tokens: Path, damage: str, how: Verify) -> None:
    change, message = DAMAGE[damage]
    change(tokens / "train-tokens-00003.bin")
    problems = []
    for rank in range(3):
        try:
            datasets.prepare(text_config(tokens, how), Topology(rank, 3, rank, 3))
        except ConfigError as error:
            problems += error.problems
    if damage == "changed" and how is Verify.size:
        assert problems == []
        return
    assert len(problems) == 1
    assert problems[0].startswith(f"data.path={tokens}: train-tokens-00003.bin ")
    assert message in problems[0]
    datasets.prepare(text_config(tokens, Verify.off), ALONE)


def test_an_index_of_another_dataset_does_not_pass(tokens: Path, tmp_path: Path) -> None:
    (tmp_path / "others").write_text("other text" * 100)
    shard_data.main(["source=text", f"path={tmp_path / 'others'}", f"out={tmp_path / 'other'}", "shard_bytes=70"])
    shutil.copy(tmp_path / "other" / "index.json", tokens)
    datasets.prepare(text_config(tokens, Verify.size), ALONE)
    with pytest.raises(ConfigError, match=r"index\.json belongs to other shards") as error:
        datasets.prepare(text_config(tokens), ALONE)
    assert len(error.value.problems) == shards.MAX_PROBLEMS + 1
    assert "10 more shards of 15 are like this" in error.value.problems[-1]


def resealed(change: Callable[[Any], object]) -> Callable[[Path], object]:
    """Changes an index as one who also names the right SHA-256."""

    def apply(path: Path) -> None:
        content = json.loads(path.read_bytes())
        change(content)
        content["sha256"] = shards._content_sha256(content)
        path.write_text(json.dumps(content))

    return apply


def edited(old: str, new: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(path.read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, "there is no index.json; name a folder that python -m recipes shard-data has written to its end"),
        (lambda path: path.write_text("{"), "index.json is not JSON"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "index.json is not JSON"),
        (
            lambda path: path.write_text("[" * 2000 + "]" * 2000),
            "index.json is not JSON (it is nested more than 100 deep",
        ),
        (folder_instead, "index.json cannot be read (is not a regular file)"),
        (fifo_instead, "index.json cannot be read (is not a regular file)"),
        (lambda path: path.write_text("[1]"), "lacks the key 'version'"),
        (lambda path: path.write_text('{"version": 1}'), "was changed after it was written"),
        (edited('"version": 1', '"version": 2'), "has version 2 of the format, and this program reads version 1"),
        (edited('"count": 70', '"count": 71'), "was changed after it was written"),
        (resealed(lambda index: index.pop("kind")), "lacks the key 'kind'"),
        (resealed(lambda index: index["parts"].pop("test")), "lacks the key 'test'"),
        (resealed(lambda index: index["parts"]["test"]["fields"].clear()), "lacks the key 'tokens'"),
        (resealed(lambda index: index.update(kind="sound")), "kind is 'sound', which must be images or text"),
        (resealed(lambda index: index.update(parts=[])), "cannot be understood"),
        (resealed(lambda index: index.update(tokenizer={"kind": "word"})), "cannot be understood (no tokenizer"),
        (resealed(lambda index: index.update(tokenizer=None)), "cannot be understood (no tokenizer"),
        (
            resealed(lambda index: index["parts"]["train"]["fields"]["tokens"].update(dtype="<u2")),
            "tokens must be |u1, as the tokenizer's are",
        ),
        (
            resealed(lambda index: index["parts"]["train"]["fields"]["tokens"]["shards"].pop()),
            "the shards of tokens have",
        ),
        (
            resealed(lambda index: index["parts"]["train"]["fields"]["tokens"]["shards"][0].update(file="../x")),
            "the shards of tokens are not within the folder",
        ),
        (
            resealed(lambda index: index["parts"]["train"]["fields"]["tokens"]["shards"][0].update(count="70")),
            "'70' is no number of items or bytes",
        ),
        (resealed(lambda index: index["parts"]["train"].update(num_bytes=-1)), "-1 is no number of items or bytes"),
        (resealed(lambda index: index.update(kind="\n")), "kind is '\\n', which must be images or text"),
    ],
)
def test_a_wrong_index_is_refused_with_one_message(
    tokens: Path, change: Callable[[Path], object], message: str
) -> None:
    change(tokens / "index.json")
    with pytest.raises(ConfigError) as error:
        datasets.prepare(text_config(tokens, Verify.off), ALONE)
    assert len(error.value.problems) == 1
    assert error.value.problems[0].startswith(f"data.path={tokens}: ")
    assert message in error.value.problems[0]


def test_images_and_classes_must_be_as_many(images: Path) -> None:
    def one_less(index: Any) -> None:
        field = index["parts"]["test"]["fields"]["classes"]
        field["count"] = field["shards"][0]["count"] = NUM_TEST - 1

    resealed(one_less)(images / "index.json")
    with pytest.raises(ConfigError, match="the test part has 20 images and 19 classes"):
        datasets.prepare(image_config(images), ALONE)


def test_no_memory_is_taken_for_what_an_index_promises(images: Path) -> None:
    def promise(index: Any) -> None:
        for field in index["parts"]["train"]["fields"].values():
            field["count"] = 1 << 40
            field["shards"] = [{"file": "train-classes-00000.bin", "count": 1 << 40, "sha256": ""}]

    resealed(promise)(images / "index.json")
    train, _ = datasets.load_images(image_config(images))
    for array in (train.images, train.classes):
        with pytest.raises(ConfigError, match=r"train-classes-00000\.bin has 50 bytes instead of \d+"):
            array[:]


def test_shards_hold_no_number_that_the_model_lacks(images: Path) -> None:
    path = images / "train-classes-00000.bin"
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    train, _ = datasets.load_images(image_config(images))
    assert len(train.get_batch(np.array([1, 2]))[1]) == 2
    for items in (np.array([0, 1]), slice(0, 2)):
        with pytest.raises(
            ConfigError, match=r"train-classes-00000\.bin .* has the number 10, and all must be below 10"
        ):
            train.get_batch(items)


def test_a_folder_of_shards_may_be_reached_by_a_link(tokens: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tokens)
    datasets.prepare(text_config(tmp_path / "link"), ALONE)
    assert len(datasets.load_text(text_config(tmp_path / "link"), 8).train.get_batch(np.array([0]))[0]) == 1


def test_what_does_not_fit_the_recipe_is_refused(images: Path, tokens: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds images, which go with data=image_shards; .* source=text"):
        datasets.load_text(text_config(images), 8)
    with pytest.raises(ConfigError, match=r"holds text, which go with data=text_shards; .* source=idx"):
        datasets.load_images(image_config(tokens))
    with pytest.raises(ConfigError, match=r"data\.path=null: must name the folder"):
        datasets.prepare(text_config(None), ALONE)
    with pytest.raises(ConfigError, match=r"held-out part has 100 tokens, .* a model\.context of at most 99"):
        datasets.load_text(text_config(tokens), 100)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["source=text", "path=nowhere"], "path=nowhere: there is no such file or folder"),
        (["source=idx", "path=nowhere"], "path=nowhere: lacks train-images-idx3-ubyte"),
        (["source=text", "path=null", "shard_bytes=0"], "shard_bytes=0: must be at least 1"),
        (["source=text", "path=null", "tokenizer=bpe", "vocabulary_size=9"], "vocabulary_size=9: must be 257"),
        (["source=text", "path=null", "tokenizer=word"], "tokenizer=word: wrong type"),
    ],
)
def test_the_command_refuses_with_one_message_and_writes_nothing(
    tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        shard_data.main([*words, f"out={tmp_path / 'out'}"])
    assert len(error.value.problems) == 1
    assert error.value.problems[0].startswith(message)
    assert not list(tmp_path.iterdir())


def test_damaged_idx_files_are_named_and_nothing_is_written(idx: Path, tmp_path: Path) -> None:
    path = idx / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=f"^path={idx}: t10k-images-idx3-ubyte is damaged: its header promises"):
        shard_data.main(["source=idx", f"path={idx}", f"out={tmp_path / 'out'}"])
    assert list(tmp_path.iterdir()) == [idx]


def test_a_folder_that_holds_something_is_never_overwritten(tokens: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tokens.iterdir()}
    with pytest.raises(ConfigError, match=f"out={tokens}: exists and is no empty folder"):
        shard_data.main(["source=text", "path=null", f"out={tokens}"])
    assert before == {path: path.stat().st_mtime_ns for path in tokens.iterdir()}


def start(path: Path, out: Path) -> subprocess.Popen[str]:
    """Starts the command with shards so small that it takes a while, and returns when some are written."""
    path.write_text("many words " * 1_000_000)
    command = [sys.executable, "-m", "recipes", "shard-data", "source=text", f"path={path}", f"out={out}"]
    process = subprocess.Popen([*command, "shard_bytes=2000"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(out.parent.glob(".out.*.unfinished/*.bin")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_a_killed_command_leaves_nothing_at_the_target_and_the_next_one_tidies_up(tmp_path: Path) -> None:
    path, out = tmp_path / "text", tmp_path / "out"
    with start(path, out) as process:
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    live, foreign = (tmp_path / f".out.{host}.unfinished" for host in (f"{os.uname().nodename}.1", "elsewhere.99999"))
    live.mkdir()  # of a process that runs, and of another host's, which cannot be asked
    foreign.mkdir()
    assert len(list(tmp_path.glob(".out.*.unfinished"))) == 3
    shard_data.main(["source=text", f"path={path}", f"out={out}"])
    datasets.prepare(text_config(out), ALONE)
    assert sorted(tmp_path.iterdir()) == sorted([path, out, live, foreign])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_tidies_up(tmp_path: Path, number: signal.Signals) -> None:
    path, out = tmp_path / "text", tmp_path / "out"
    with start(path, out) as process:
        process.send_signal(number)
        _, message = process.communicate(timeout=60)
    assert (process.returncode, message) == (
        128 + number,
        "interrupted before the end; only a finished dataset is kept\n",
    )
    assert list(tmp_path.iterdir()) == [path]


PEAK = """
import re, sys
from recipes.commands import shard_data
shard_data.main(sys.argv[1:])
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""


def peak_megabytes(*words: str) -> float:
    """Peak resident memory of the command in a process of its own."""
    command = [sys.executable, "-c", PEAK, *words]
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return int(result.stdout.split()[-1]) / 1024


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    # 44 MB: neither the text nor its tokens could be held.
    (tmp_path / "large").write_bytes(b"many words " * 4_000_000)
    (tmp_path / "small").write_bytes(b"many words " * 100)
    small, large = (
        peak_megabytes("source=text", f"path={tmp_path / name}", f"out={tmp_path / name}-out", "tokenizer=char")
        for name in ("small", "large")
    )
    assert large - small < 20


def test_the_index_says_what_is_documented(tokens: Path) -> None:
    index = json.loads((tokens / "index.json").read_text())
    assert list(index) == ["version", "kind", "tokenizer", "parts", "sha256"]
    field = index["parts"]["train"]["fields"]["tokens"]
    content = b"".join((tokens / shard["file"]).read_bytes() for shard in field["shards"])
    assert content == b"words and " * 90
    assert hashlib.sha256(content).hexdigest() == field["sha256"]
    assert (field["dtype"], field["item_shape"], field["count"]) == ("|u1", [], 900)
    assert index["parts"]["train"]["num_bytes"] == 900


def test_idx_blocks_of_any_size_are_the_file(idx: Path) -> None:
    classes = mnist.open_idx(idx, "train-labels-idx1-ubyte", ())
    for num_items in (1, 7, NUM_TRAIN, 99):
        assert np.concatenate(list(classes.blocks(num_items))).tolist() == digits.load()[0].classes[:NUM_TRAIN].tolist()

"""Tokenizers, and text in examples."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

from common.config.schema import TextConfig, TokenizerKind
from common.data.datasets import text, tokenizer
from common.data.datasets.text import Text, Windows
from common.data.datasets.tokenizer import Stream
from common.errors import ConfigError
from tests.helpers.launch import ROOT

import numpy as np
import pytest

KINDS = list(TokenizerKind)
STRANGE = "Grüße 字字 \U0001f600\r\n\t\x00 don't  <|endoftext|> " + "x" * 100
LEARN = """
import hashlib, json
from common.config.schema import TokenizerKind
from common.data.datasets import tokenizer
from pydoc_data.topics import topics
learned = tokenizer.train(TokenizerKind.bpe, (topics[name] for name in sorted(topics)), 600)
print(hashlib.sha256(json.dumps(learned.to_json()).encode()).hexdigest())
"""


def config(path: Path | None, kind: TokenizerKind = TokenizerKind.byte, vocabulary_size: int = 300) -> TextConfig:
    return TextConfig("text", False, None if path is None else str(path), kind, vocabulary_size)


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_comes_back_from_its_ids(kind: TokenizerKind) -> None:
    trained = tokenizer.train(kind, [STRANGE, "other words, other words"], 300)
    again = tokenizer.from_json(json.loads(json.dumps(trained.to_json())))
    ids = trained.encode(STRANGE)
    assert again.encode(STRANGE).tolist() == ids.tolist()
    assert again.decode(ids) == STRANGE
    assert ids.dtype == again.dtype == (np.uint16 if kind is TokenizerKind.bpe else np.uint8)
    assert again.vocabulary_size == trained.vocabulary_size > ids.max()


@pytest.mark.parametrize("kind", [TokenizerKind.byte, TokenizerKind.bpe])
def test_characters_unseen_in_training_come_back(kind: TokenizerKind) -> None:
    trained = tokenizer.train(kind, ["plain words"], 300)
    assert trained.decode(trained.encode(STRANGE)) == STRANGE


def test_the_alphabet_is_sorted_and_has_one_id_for_all_others() -> None:
    trained = tokenizer.train(TokenizerKind.char, ["cab", "bz"], 0)
    assert trained.encode("abcz").tolist() == [0, 1, 2, 3]
    assert trained.encode("yAz~").tolist() == [4, 4, 3, 4]
    assert (trained.vocabulary_size, trained.decode([4, 0])) == (5, "\ufffda")


@pytest.mark.parametrize(("num_characters", "dtype"), [(255, np.uint8), (256, np.uint16), (65536, np.uint32)])
def test_ids_are_as_small_as_the_vocabulary_allows(num_characters: int, dtype: type) -> None:
    alphabet = "".join(map(chr, range(0x10000, 0x10000 + num_characters)))
    ids = tokenizer.train(TokenizerKind.char, [alphabet], 0).encode(alphabet)
    assert (ids.dtype.type, int(ids[-1])) == (dtype, num_characters - 1)


def test_incomplete_characters_are_replaced_not_refused() -> None:
    trained = tokenizer.train(TokenizerKind.byte, [], 0)
    assert trained.decode(trained.encode("a\U0001f600")[:-1]) == "a\ufffd"
    assert trained.decode([0x80, 0x62]) == "\ufffdb"


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_gives_whole_characters_only(kind: TokenizerKind) -> None:
    trained = tokenizer.train(kind, [STRANGE], 257)
    stream = Stream(trained)
    given = [stream.add(token) for token in trained.encode(STRANGE)]
    assert "".join(given) + stream.rest() == STRANGE
    assert not any("\ufffd" in characters for characters in given)
    stream = Stream(tokenizer.train(TokenizerKind.byte, [], 0))
    assert [stream.add(0xC3), stream.rest()] == ["", "\ufffd"]


def test_bpe_learns_the_same_in_every_process() -> None:
    learned = {
        subprocess.run(
            [sys.executable, "-c", LEARN],
            check=True,
            capture_output=True,
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": parallel},
        ).stdout
        for seed, parallel in (("1", "true"), ("2", "false"))
    }
    assert len(learned) == 1
    assert len(learned.pop().split()) == 1


def test_the_tokenizers_library_is_imported_for_bpe_only() -> None:
    statements = "import sys, common.data.datasets; print('tokenizers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", statements], check=True, capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "False\n"


def test_windows_are_inputs_and_the_tokens_after_them() -> None:
    windows = Windows.of(np.arange(12, dtype=np.uint8), 3, 12)
    assert [len(Windows.of(np.arange(size), 3, size)) for size in (0, 1, 3, 4, 6, 7)] == [0, 0, 0, 1, 1, 2]
    inputs, targets = windows.get_batch(np.array([2, 0]))
    assert inputs.tolist() == [[6, 7, 8], [0, 1, 2]]
    assert targets.tolist() == [[7, 8, 9], [1, 2, 3]]
    assert inputs.dtype == targets.dtype == np.int64
    for whole, parts in zip(windows.get_batch(slice(None)), windows.get_batch(np.arange(3)), strict=True):
        assert np.array_equal(whole, parts)
    with pytest.raises(IndexError):
        windows.get_batch(np.array([3]))


def test_the_default_is_the_language_reference_with_a_tenth_held_out() -> None:
    corpus = text.load(config(None), context=64)
    sizes = [part.num_bytes for part in (corpus.train, corpus.test)]
    assert sizes == [len(corpus.train.tokens), len(corpus.test.tokens)]
    assert sizes[1] / sum(sizes) == pytest.approx(0.1, abs=1e-4)
    assert "assert_stmt" in corpus.tokenizer.decode(corpus.train.tokens[:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_bytes", [8, 13, 1 << 16])
def test_a_folder_is_its_files_in_order(
    tmp_path: Path, kind: TokenizerKind, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "BLOCK_BYTES", block_bytes)
    files = {"b.txt": "字字字", "a/2": "", "a/10": "\U0001f600" * 40, ".hidden": "no", ".git/x": "no", "c": "é" * 31}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content.encode())
    whole = "".join(files[name] for name in ("a/10", "a/2", "b.txt", "c"))
    found = Text.open(str(tmp_path))
    parts = {part: "".join(found.blocks(part)) for part in text.PARTS}
    assert parts["train"] + parts["test"] == whole
    assert {part: len(parts[part].encode()) for part in parts} == found.num_bytes
    assert 0 <= found.num_bytes["test"] - len(whole.encode()) // 10 <= 3
    corpus = text.load(config(tmp_path, kind, 257), context=4)
    assert corpus.tokenizer.decode(corpus.train.tokens[:]) == parts["train"]


def test_the_alphabet_is_that_of_the_training_part(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("ab" * 45 + "z" * 10)
    corpus = text.load(config(tmp_path / "text", TokenizerKind.char), context=2)
    assert corpus.tokenizer.vocabulary_size == 3
    assert set(corpus.test.tokens[:].tolist()) == {2}


def test_bpe_trains_on_a_bounded_sample_from_all_over_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "SAMPLE_BYTES", 100)
    blocks = [f"{number:010}" for number in range(100)]
    assert [int(block) for block in text._sample(blocks, 1000)] == list(range(0, 100, 10))
    assert list(text._sample(blocks[:10], 100)) == blocks[:10]


@pytest.mark.parametrize(
    ("content", "kind", "vocabulary_size", "message"),
    [
        (None, "byte", 0, "data.path={path}: there is no such file or folder; name a UTF-8 file"),
        (b"", "byte", 0, "data.path={path}: has 0 bytes of text, too few to hold out a tenth"),
        (b"short", "byte", 0, "data.path={path}: has 5 bytes of text, too few to hold out a tenth"),
        (b"x" * 100, "byte", 0, "the held-out part has 10 tokens, too few for one example, which has model.context=16"),
        (b"x" * 100, "byte", 0, "use a model.context of at most 9, or more text"),
        (b"x" * 50 + b"\xff" + b"x" * 50, "byte", 0, "{path} is not UTF-8 (at byte 50); convert it (iconv -t UTF-8)"),
        (b"x" * 97 + b"\xe5\xad", "char", 0, "{path} is not UTF-8 (at byte 97)"),
        (b"x" * 1000, "bpe", 256, "data.vocabulary_size=256: must be 257 (the bytes and one pair) to 65536"),
        (b"x" * 1000, "bpe", 10**12, "data.vocabulary_size=1000000000000: must be 257"),
    ],
)
def test_unusable_text_is_refused_with_the_remedy(
    tmp_path: Path, content: bytes | None, kind: str, vocabulary_size: int, message: str
) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        text.load(config(path, TokenizerKind[kind], vocabulary_size), context=16)
    assert message.format(path=path) in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x" * 1000)
    found = Text.open(str(tmp_path))
    (tmp_path / "text").unlink()
    os.mkfifo(tmp_path / "text")
    with pytest.raises(ConfigError, match=r"data\.path=.*: .*text cannot be read \(is not a regular file\); make it"):
        list(found.blocks("train"))
    with pytest.raises(ConfigError, match=r"cannot be read \(File name too long\)"):
        Text.open("x" * 300)


@pytest.mark.parametrize(
    "description",
    [None, [], {"kind": []}, {"kind": "char", "alphabet": ["a"]}, {"kind": "bpe", "model": {"model": {"vocab": 1}}}],
)
def test_what_describes_no_tokenizer_is_refused(description: object) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer|alphabet|invalid type"):
        tokenizer.from_json(description)


def test_of_a_description_only_what_was_learned_is_used() -> None:
    trained = tokenizer.train(TokenizerKind.bpe, ["words and words " * 50], 270)
    description = copy.deepcopy(trained.to_json())
    description["model"]["normalizer"] = {"type": "Replace", "pattern": {"String": "w"}, "content": "x" * 1000}
    description["model"]["model"]["dropout"] = 0.5
    assert tokenizer.from_json(description).encode("words").tolist() == trained.encode("words").tolist()


def test_the_place_in_a_file_of_many_blocks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "BLOCK_BYTES", 8)
    (tmp_path / "a").write_bytes(b"x" * 200)
    (tmp_path / "b").write_bytes("é".encode() * 15 + b"x\xffx" + b"x" * 500)
    with pytest.raises(ConfigError, match=r"b is not UTF-8 \(at byte 31\)"):
        text.load(config(tmp_path), context=4)

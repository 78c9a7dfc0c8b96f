"""The build's edits are exact, and the setup says what it needs."""

import importlib.util
import itertools
import re
import sys
from pathlib import Path
from types import ModuleType

from tests.launch import ROOT, run

import pytest


@pytest.fixture(scope="module")
def wheel() -> ModuleType:
    """build/horovod/wheel.py as a module."""
    spec = importlib.util.spec_from_file_location("wheel", ROOT / "build" / "horovod" / "wheel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def edit(tmp_path: Path) -> Path:
    """An edit of the file `source`, which has four lines."""
    (tmp_path / "source").write_text("one\ntwo\nthree\nfour\n")
    path = tmp_path / "01.patch"
    path.write_text("Why.\n\n--- source\n+++ source\n@@ -1,4 +1,4 @@\n one\n two\n-three\n+THREE\n four\n")
    return path


def test_an_edit_is_applied_to_the_letter(wheel: ModuleType, edit: Path) -> None:
    wheel.apply_edits(edit.parent, [edit])
    assert (edit.parent / "source").read_text() == "one\ntwo\nTHREE\nfour\n"


@pytest.mark.parametrize("content", ["one\ntwo\n3\nfour\n", "ONE\ntwo\nthree\nfour\n", "one\ntwo\nTHREE\nfour\n", None])
def test_an_edit_that_no_longer_applies_stops_the_build(wheel: ModuleType, edit: Path, content: str | None) -> None:
    source = edit.parent / "source"
    source.unlink() if content is None else source.write_text(content)
    with pytest.raises(wheel.BuildError, match=r"01\.patch does not apply"):
        wheel.apply_edits(edit.parent, [edit])


def test_each_edit_has_its_reason_and_a_link() -> None:
    edits = sorted((ROOT / "build" / "horovod" / "edits").glob("*.patch"))
    assert edits
    for path in edits:
        reason, _, _ = path.read_text().partition("\n--- ")
        assert re.search("https://github.com/(horovod/horovod|pytorch/gloo)/", reason), path.name


def test_whatever_decides_a_wheel_is_in_its_key(wheel: ModuleType, edit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = wheel.build_variables(mpi=False, cuda=False)
    keys = [wheel.cache_key(plain, []), wheel.cache_key(wheel.build_variables(mpi=False, cuda=True), [])]
    keys.append(wheel.cache_key(plain, [edit]))
    edit.write_text(edit.read_text().replace("THREE", "3"))
    keys.append(wheel.cache_key(plain, [edit]))
    monkeypatch.setattr(wheel, "installed_frameworks", lambda: {"torch": "2.99.0"})
    keys.append(wheel.cache_key(plain, []))
    assert all(a != b for a, b in itertools.combinations(keys, 2))


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        (
            ["FRAMEWORKS=jax"],
            {},
            "FRAMEWORKS=jax: not an option of the setup; choose from FRAMEWORKS=torch,tf|torch|tf",
        ),
        (["FRAMEWORKS=tf"], {"CXX": "no-such-compiler"}, "lacks a C++ compiler (Debian, Ubuntu: g++"),
    ],
)
def test_the_setup_says_what_is_wrong(arguments: list[str], env: dict[str, str], message: str, tmp_path: Path) -> None:
    setup = tmp_path / "build" / "setup.py"  # in a tree of its own, as it works on the .venv beside it
    setup.parent.mkdir()
    setup.write_text((ROOT / "build" / "setup.py").read_text())
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    result = run([sys.executable, setup, *arguments], env=env)
    assert result.returncode != 0
    assert message in result.stdout
    assert not (tmp_path / ".venv").exists()

"""The build's edits are exact, and the setup says what it needs."""

import importlib.util
import itertools
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

from tests.helpers.launch import ROOT, run

import pytest


def script(path: str) -> ModuleType:
    """A script of install/ as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "install" / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wheel() -> ModuleType:
    """install/horovod/wheel.py as a module."""
    return script("horovod/wheel.py")


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    """install/setup.py as a module."""
    return script("setup.py")


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


def test_an_edit_can_add_a_file(wheel: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "01.patch"
    path.write_text("Why.\n\n--- /dev/null\n+++ folder/added\n@@ -0,0 +1,2 @@\n+one\n+two\n")
    (tmp_path / "folder").mkdir()
    wheel.apply_edits(tmp_path, [path])
    assert (tmp_path / "folder" / "added").read_text() == "one\ntwo\n"


@pytest.mark.parametrize("content", ["one\ntwo\n3\nfour\n", "ONE\ntwo\nthree\nfour\n", "one\ntwo\nTHREE\nfour\n", None])
def test_an_edit_that_no_longer_applies_stops_the_build(wheel: ModuleType, edit: Path, content: str | None) -> None:
    source = edit.parent / "source"
    source.unlink() if content is None else source.write_text(content)
    with pytest.raises(wheel.BuildError, match=r"01\.patch does not apply"):
        wheel.apply_edits(edit.parent, [edit])


def test_each_edit_has_its_reason_and_a_link() -> None:
    edits = sorted((ROOT / "install" / "horovod" / "edits").glob("*.patch"))
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


def test_a_wheel_that_was_changed_in_the_cache_is_not_taken(wheel: ModuleType, tmp_path: Path) -> None:
    built, kept = tmp_path / "horovod-1.whl", tmp_path / "kept"
    built.write_text("as it was built")
    wheel.keep(built, "{}", kept)
    assert wheel.take(kept).read_text() == "as it was built"
    (kept / built.name).write_text("otherwise")
    with pytest.raises(wheel.BuildError, match="has changed since it was built"):
        wheel.take(kept)


def test_a_wheel_says_what_was_changed(wheel: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "horovod").mkdir()
    wheel.label(tmp_path, sorted((ROOT / "install" / "horovod" / "edits").glob("*.patch")))
    notice = (tmp_path / "NOTICE").read_text()
    assert "- 01-cxx17: " in notice
    assert "- horovod/runner/launch.py\n" in notice
    facts: dict[str, Any] = {}
    exec((tmp_path / "horovod" / "edits.py").read_text(), facts)
    assert facts["FRAMEWORKS"] == wheel.installed_frameworks()
    last = list(facts["EDITS"])[-1]
    assert facts["VERSION"] == f"0.28.1+recipes.{int(last[:2])}"
    # The Horovod of this environment is the one of these edits.
    printed = run(["horovodrun", "--check-build"]).stdout
    assert f"Horovod v{facts['VERSION']}:" in printed
    assert f"{last} {facts['EDITS'][last]}" in [line.strip() for line in printed.splitlines()]


def test_only_packages_with_known_hashes_are_installed(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = setup.locked()
    assert all("--hash=sha256:" in line for line in pins.values())
    calls = []
    monkeypatch.setattr(setup, "pip_install", lambda *arguments: calls.append(arguments))
    (numpy,) = {pin for pin in pins if pin.startswith("numpy==2.4")}
    setup.install_locked([numpy])
    assert "--require-hashes" in calls[0]
    with pytest.raises(SystemExit, match=r"no hash of numpy==0\.0"):
        setup.install_locked(["numpy==0.0"])


@pytest.mark.parametrize("value", ["no-such.whl", "ftp://x/a.whl", "https://x/a.tar.gz", __file__])
def test_what_is_no_wheel_is_refused(value: str, setup: ModuleType) -> None:
    with pytest.raises(SystemExit, match=f"HOROVOD_WHEEL={re.escape(value)}: neither a wheel's file nor its"):
        setup.read_options([f"HOROVOD_WHEEL={value}"], {})


def test_only_a_build_for_gpus_hears_of_cuda(wheel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_GPU_OPERATIONS", "NCCL")
    monkeypatch.setenv("HOROVOD_CUDA_HOME", "folder")
    of_cuda = r"HOROVOD_(GPU|CUDA|NCCL)_"
    for cuda, names in ((False, set()), (True, {"HOROVOD_GPU_OPERATIONS", "HOROVOD_CUDA_HOME"})):
        environment = wheel.build_environment(wheel.build_variables(mpi=False, cuda=cuda))
        assert {name for name in environment if re.match(of_cuda, name)} == names


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A folder that is an index of packages with one wheel of torch, which is newer than any other 2.13.0."""
    folder = tmp_path / "torch"
    folder.mkdir()
    name = "torch-2.13.0+here"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.dist-info/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0+here\n")
        archive.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{name}.dist-info/RECORD", "")
    return tmp_path


@pytest.fixture
def address(index: Path) -> Iterator[str]:
    """Where this machine serves the index."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=index)) as server:
        Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("kind", ["URL", "FOLDER"])
def test_torch_comes_from_the_index_that_is_named(
    kind: str, index: Path, address: str, setup: ModuleType, tmp_path: Path
) -> None:
    value = address if kind == "URL" else str(index / "torch")
    options = setup.read_options([f"TORCH_INDEX={value}"], {})
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", tmp_path / "taken", "torch==2.13.0"]
    result = run([*pip, *setup.torch_source(options["TORCH_INDEX"])])
    assert result.returncode == 0, result.stdout
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["torch-2.13.0+here-py3-none-any.whl"]


def test_the_setup_says_which_phase_it_is_in(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"  # that of .venv, here one that does nothing but speak as the build of Horovod does
    answers = (
        """case "$*" in *--report*) echo '{"install": []}';; *) printf 'fetch\\nedits\\ncompile\\na.whl\\n';; esac"""
    )
    python.write_text(f"#!/bin/sh\n{answers}\n")
    python.chmod(0o755)
    monkeypatch.setattr(setup, "PYTHON", python)
    progress = setup.Progress()
    progress.begin("environment")
    setup.fill(setup.read_options([], {}), progress)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [f"[{number}/7]" for number in range(1, 8)]
    assert re.findall(r"([a-z]+) \d+", progress.summary()) == list(setup.PHASES)


def make(*words: str, path: str | None = None) -> tuple[int, str]:
    """Status and output of make, with another PATH if one is given."""
    outermost = {"MAKELEVEL": "0", "MAKEFLAGS": ""}  # not one that `make test` calls, which would say where it is
    result = run([shutil.which("make"), *words], env=outermost | ({} if path is None else {"PATH": path}))
    return result.returncode, result.stdout


@pytest.mark.parametrize("target", ["help", "setup"])
def test_make_refuses_a_variable_that_it_does_not_know(target: str) -> None:
    status, output = make("-n", target, "FRAMWORKS=torch", "NP=3")
    assert status == 2
    assert (
        "FRAMWORKS=torch: not an option; choose from FRAMEWORKS ACCELERATOR WITH_MPI TORCH_INDEX HOROVOD_WHEEL PYTHON"
        in output
    )
    assert len(output.splitlines()) == 1


def test_make_takes_the_variables_that_it_lists() -> None:
    options = re.findall(r"^  ([A-Z_]+)=", make("help")[1], re.MULTILINE)
    assert {"FRAMEWORKS", "TORCH_INDEX", "NP"} <= set(options)
    status, output = make("help", *(f"{name}=a b" for name in (*options, "CXX")))
    assert status == 0, output


def test_make_says_that_it_found_no_python(tmp_path: Path) -> None:
    status, output = make("setup", "PYTHON=no-such-python", path=str(tmp_path))
    assert status == 2
    assert "no Python that runs; the setup needs Python 3.10 to 3.13" in output
    assert "make setup PYTHON=/path/to/python3.11" in output
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        (
            ["FRAMEWORKS=jax"],
            {},
            "FRAMEWORKS=jax: not an option of the setup; choose from FRAMEWORKS=torch,tf|torch|tf",
        ),
        (["TORCH_INDEX=ftp://x"], {}, "TORCH_INDEX=ftp://x: neither an http(s) URL nor a folder;"),
        (["FRAMEWORKS=tf"], {"CXX": "no-such-compiler"}, "lacks a C++ compiler (Debian, Ubuntu: g++"),
    ],
)
def test_the_setup_says_what_is_wrong(arguments: list[str], env: dict[str, str], message: str, tmp_path: Path) -> None:
    setup = tmp_path / "install" / "setup.py"  # in a tree of its own, as it works on the .venv beside it
    setup.parent.mkdir()
    setup.write_text((ROOT / "install" / "setup.py").read_text())
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    result = run([sys.executable, setup, *arguments], env=env)
    assert result.returncode != 0
    assert message in result.stdout
    assert not (tmp_path / ".venv").exists()

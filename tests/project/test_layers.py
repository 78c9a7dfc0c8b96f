"""Imports only point down, the two bindings have the same rooms and files, and the tests have the same rooms, too."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from tests.helpers.launch import ROOT

import pytest

# Rooms from the ground up; a room imports from itself and from those below it. Both bindings stand on the neutral ones.
NEUTRAL = ("errors", "file_io", "distributed", "config", "data", "gradients", "parallel", "training")
BINDING = ("distributed", "gradients", "models", "parallel", "training", "engine", "job", "script")
BINDINGS = ("torch", "tf")
FRAMEWORKS = ("torch", "tensorflow", "keras", "horovod")
# Files that only one binding has.
ONE_BINDING = {
    "torch/gradients/bucket_exchange.py": "hooks of backward; a graph's order of data does it in TensorFlow",
    "torch/parallel/split_backward.py": "a tape makes both gradients at once",
    "t*/script/*": "Keras has fit and callbacks; a loop in PyTorch has a loader",
}


def modules() -> list[Path]:
    """All modules of common/."""
    return sorted((ROOT / "common").rglob("*.py"))


def imported(path: Path, package: str) -> Iterator[str]:
    """The names below a package that a module imports anywhere, such as common.data.sampler."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == package)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(name: str) -> tuple[int, int, str]:
    """Where a module stands: on the neutral floors or above them, on which floor, and in which room."""
    first, *rest = name.split(".")[1:]
    if first in BINDINGS:
        return 1, BINDING.index(rest[0]) if rest and rest[0] in BINDING else -1, f"{first}.{rest[0] if rest else ''}"
    return 0, NEUTRAL.index(first), first


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_only_point_down(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if name == "common":
        return
    above, level, room = floor(name)
    for target in imported(path, "common"):
        target_above, target_level, target_room = floor(target)
        is_below = (target_above, target_level) < (above, level)
        other_binding = above and target_above and room.split(".")[0] != target_room.split(".")[0]
        assert target_room == room or (is_below and not other_binding), f"{name} imports {target}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_neutral_modules_know_no_framework(path: Path) -> None:
    if path.relative_to(ROOT / "common").parts[0] not in BINDINGS:
        names = [name for framework in FRAMEWORKS for name in imported(path, framework)]
        assert not [name for name in names if not name.startswith("horovod.runner.")]  # the launcher needs none


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_engine_can_be_used_without_a_configuration_of_a_run(path: Path) -> None:
    binding, *inner = path.relative_to(ROOT / "common").parts
    if binding in BINDINGS and inner[-1] not in ("job.py", "autotune.py"):
        assert "common.config.schema.RunConfig" not in imported(path, "common")


def test_both_bindings_have_the_same_files() -> None:
    files = {
        binding: {path.relative_to(ROOT / "common" / binding).as_posix() for path in modules() if binding in path.parts}
        for binding in BINDINGS
    }
    alone = {
        f"{binding}/{path}"
        for binding, other in (BINDINGS, BINDINGS[::-1])
        for path in files[binding] - files[other]
        if not path.endswith("__init__.py")
    }
    assert {path for path in alone if not any(fnmatch(path, pattern) for pattern in ONE_BINDING)} == set()
    assert [pattern for pattern in ONE_BINDING if not any(fnmatch(path, pattern) for path in alone)] == []


def test_every_room_has_its_folder_of_tests() -> None:
    rooms = {name for name in (*NEUTRAL, *BINDING) if list((ROOT / "common").glob(f"**/{name}/__init__.py"))}
    assert {room for room in rooms if not list((ROOT / "tests" / room).glob("test_*.py"))} == set()


def test_what_tests_share_is_a_helper() -> None:
    for path in sorted((ROOT / "tests").rglob("*.py")):
        names = {part for name in imported(path, "tests") for part in name.split(".")}
        assert {name for name in names if name.startswith("test_") or name == "conftest"} == set(), path

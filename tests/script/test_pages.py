"""The pages of docs/your-own-script.md, and what scripts import."""

import sys
from pathlib import Path

from tests.helpers.launch import FRAMEWORKS, horovodrun, run
from tests.helpers.pages import PAGES, numbers

import pytest


@pytest.mark.parametrize("name", PAGES)
def test_a_page_prints_the_same_on_any_number_of_ranks(name: str, tmp_path: Path) -> None:
    assert len(PAGES[name].splitlines()) <= 40
    path = tmp_path / "script.py"
    path.write_text(PAGES[name])
    alone, together = run([sys.executable, path], cwd=tmp_path), horovodrun(2, path, cwd=tmp_path)
    assert (alone.returncode, together.returncode) == (0, 0), alone.stdout + together.stdout
    assert len(numbers(alone.stdout)) == 6
    assert numbers(together.stdout) == pytest.approx(numbers(alone.stdout), rel=1e-5)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("kind", ["module", "package"])
def test_a_script_may_have_a_common_of_its_own(framework: str, kind: str, tmp_path: Path) -> None:
    own = tmp_path / "common.py" if kind == "module" else tmp_path / "common" / "__init__.py"
    own.parent.mkdir(exist_ok=True)
    own.write_text("MINE = 1\n")
    if kind == "package":
        (own.parent / "config.py").write_text("MINE = 2\n")
    part, start = {"torch": ("loop", "loop.start(compression='topk')"), "tf": ("fit", "fit.init()")}[framework]
    use = "import common.config\nassert common.config.MINE == 2\n" if kind == "package" else ""
    path = tmp_path / "script.py"
    path.write_text(
        f"from horovod_recipes import {part}\nimport common\n{start}\nassert common.MINE == 1\n{use}print('fine')"
    )
    job = run([sys.executable, path], cwd=tmp_path)
    assert "fine" in job.stdout, job.stdout

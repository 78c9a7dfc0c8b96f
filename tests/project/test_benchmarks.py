"""Every benchmark ends well at its smallest setting, prints its table, and keeps what it measured where it is told."""

import importlib
import json
import sys
from pathlib import Path

from benchmarks import side_by_side, slow_link
from tests.helpers.launch import FRAMEWORKS, ROOT, run

import pytest

pytestmark = pytest.mark.skipif(len(FRAMEWORKS) < 2, reason="benchmarks compare both frameworks")

FOLDER = ROOT / "benchmarks"
SECONDS = 600  # for one benchmark, on a machine that does other things, too; a hang ends here
MODULES = [path.stem for path in sorted(FOLDER.glob("[!_]*.py")) if "def main()" in path.read_text()]
# Peer -> the case that it is compared in, else the smallest; AdamW, of lm_tiny, has more to go wrong than SGD.
CASE_OF = {"stock": "lm_tiny", "fit": "lm_tiny"}
COMPARISONS = [
    f"{CASE_OF.get(peer, 'mnist_mlp')}.{framework}.{peer}"
    for framework, peers in side_by_side.PEERS.items()
    for peer in peers
    if peer != "one_rank"  # has no code of its own
]
# Benchmark -> its smallest setting, and how rows of its table begin.
SMALLEST: dict[str, tuple[list[str], list[str]]] = {
    "behaviour": (["--frameworks", "torch", "--runs", "linear regression"], []),
    "collectives": (
        ["--rounds", "1", "--repeats", "4"],
        ["2 ranks, allreduce in place 1", "2 ranks, message there and back 1", "4 ranks, broadcast 1"],
    ),
    "compression_quality": (
        ["--tasks", "mnist_cnn", "--sides", "none,fp16", "--seeds", "1", "--overrides", "train.max_steps=2"],
        ["none", "fp16"],
    ),
    "event_driven": (
        ["--rounds", "1", "--modes", "event-driven 20 ms", "--repeats", "4", "--epochs", "1"],
        ["2 ranks, allreduce 1", "4 ranks, broadcast 1", "2 ranks, mnist_mlp_torch", "2 ranks, mnist_mlp_tf"],
    ),
    "goodput": (["--seconds", "2", "--every", "2"], ["torch, undisturbed", "torch, elastic 2", "torch, supervised 2"]),
    "overheads": (["mnist_mlp_torch", "--launches", "1", "--steps", "2"], ["mnist_mlp_torch"]),
    "pipeline": (["--rounds", "1", "--steps", "1"], ["one_rank", "peer"]),
    "side_by_side": ([*COMPARISONS, "--pairs", "1", "--steps", "2"], COMPARISONS),
    "slow_link": (
        ["mnist_mlp", "--sides", "fp16,ddp_fp16,ddp_powersgd", "--rounds", "1", "--steps", "4"],
        [f"mnist_mlp | {side}" for side in ("ddp", "ddp_fp16", "ddp_powersgd", "fp16")],
    ),
    "stage_memory": (["--model", "lm_tiny"], ["all", *(f"stage {number}" for number in range(4))]),
    "staleness": (["--epochs", "1"], ["sync, all alike", "async, one slow"]),
}


@pytest.mark.parametrize("module", MODULES)
def test_a_benchmark_says_how_it_is_used(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"benchmarks.{module}").main()
    assert capsys.readouterr().out.startswith("usage:")


@pytest.mark.parametrize("module", MODULES)
def test_a_benchmark_measures(module: str, tmp_path: Path) -> None:
    if module == "slow_link" and (problem := slow_link.missing()):
        pytest.skip(problem)
    options, rows = SMALLEST[module]
    of_project, of_test = FOLDER / "results" / f"{module}.json", tmp_path / "results.json"
    before = of_project.read_bytes() if of_project.exists() else None
    keeping = ["--results", of_test] if before else []
    result = run([sys.executable, "-m", f"benchmarks.{module}", *options, *keeping], timeout=SECONDS)
    assert result.returncode == 0, result.stdout
    assert [row for row in rows if f"| {row} |" not in result.stdout] == []
    if before:
        assert json.loads(of_test.read_text())
        assert of_project.read_bytes() == before

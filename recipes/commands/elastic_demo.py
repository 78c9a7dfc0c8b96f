"""Shows an elastic run on two local hosts: one is lost in the middle and comes back, and the result is the same.

    python -m recipes elastic-demo
    python -m recipes elastic-demo recipe=mnist_mlp_tf kill_at=100

It trains twice, first undisturbed, and then with a `kill -9` of rank 0 at step kill_at. It takes a minute or two.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.data import example_log
from common.errors import ConfigError
from recipes.commands import parse

STEPS = 300
COMMON = (f"train.max_steps={STEPS}", "train.reproducible=true", "train.lanes=2", "data.ledger=true")
# Two names for this host count as two hosts.
HOSTS = "#!/bin/sh\necho localhost:1\necho 127.0.0.1:1\n"
ELASTIC = ("--min-np", "1", "--max-np", "2", "--network-interfaces", "lo", "--blacklist-cooldown-range", "1", "2")
SHOWN = re.compile(r"step |Killed|a rank is lost|ranks join|useful time|done in|\w+: \d ranks?, ")


@dataclass
class Arguments:
    """The arguments of the command."""

    recipe: str = "mnist_mlp_torch"
    kill_at: int = 60


def main(words: Sequence[str]) -> None:
    """Trains twice, and compares."""
    arguments = parse(Arguments, words)
    if shutil.which("horovodrun") is None:
        raise ConfigError(["horovodrun: not found; run make setup, and source .venv/bin/activate"])
    names = sorted(path.stem for path in Path(__file__).parents[1].glob("mnist_*.py"))
    if arguments.recipe not in names:
        raise ConfigError([f"recipe={arguments.recipe}: choose {'|'.join(names)}"])
    if not 1 <= arguments.kill_at < STEPS:
        raise ConfigError([f"kill_at={arguments.kill_at}: must be a step from 1 to {STEPS - 1}"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"1. {arguments.recipe}, {STEPS} steps on two ranks that nobody disturbs", flush=True)
        _train(arguments.recipe, folder / "whole", ["-np", "2"])
        print(
            f"\n2. The same, elastic: rank 0 is killed at step {arguments.kill_at}, and its host comes back", flush=True
        )
        chaos = f"chaos=kill:rank=0,step={arguments.kill_at};slow:seconds=0.05"
        _train(arguments.recipe, folder / "elastic", ["-np", "2", *two_hosts(folder)], "elastic=true", chaos)
        _compare(folder / "whole", folder / "elastic")


def two_hosts(folder: Path) -> list[str]:
    """The launcher's options of an elastic job on two hosts, both of them this one; their list is in the folder."""
    script = folder / "hosts.sh"
    script.write_text(HOSTS)
    script.chmod(0o755)
    return [*ELASTIC, "--host-discovery-script", str(script)]


def _train(recipe: str, folder: Path, options: Sequence[str], *overrides: str) -> None:
    """Trains, and shows the lines of the output that matter here."""
    command = ["horovodrun", *options, sys.executable, "-m", f"recipes.{recipe}", f"run.dir={folder}"]
    output: list[str] = []
    with subprocess.Popen(
        [*command, *COMMON, *overrides], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        assert job.stdout is not None  # noqa: S101 (mypy)
        for line in job.stdout:
            output.append(line)
            text = line.partition("stdout>:")[2] or line.partition("stderr>:")[2]
            if SHOWN.match(text):
                print(f"   {text}", end="", flush=True)
    if job.returncode:
        raise ConfigError([f"the run ended with status {job.returncode}:", *output[-20:]])


def _compare(whole: Path, elastic: Path) -> None:
    """Says what the loss of a rank has changed, and what it cost."""
    before, after = (json.loads((folder / "summary.json").read_text()) for folder in (whole, elastic))
    judgements = list(example_log.check(elastic))
    lost = after["goodput"]
    is_same = before["weights_sha256"] == after["weights_sha256"]
    print("\n3. What it changed, and what it cost")
    print(f"   weights: {'the same bits' if is_same else 'DIFFERENT'}, SHA-256 {after['weights_sha256'][:16]}")
    print(f"   test accuracy: {before['test_accuracy']:.4f} undisturbed, {after['test_accuracy']:.4f} elastic")
    print(
        f"   ledger: {sum(is_right for is_right, _ in judgements)} of {len(judgements)} epochs with each example once"
    )
    print(
        f"   cost: {lost['restarts']} restarts in {lost['restart_seconds']:.1f} s, {lost['replayed_steps']} steps done "
        f"twice in {lost['replay_seconds']:.1f} s; useful time {100 * lost['useful_share']:.0f} %"
    )
    if not is_same or not all(is_right for is_right, _ in judgements):
        sys.exit(1)

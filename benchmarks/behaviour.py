"""Short runs of every feature, to the bit: what a change of the code that is none of behaviour must leave as it was.

    python -m benchmarks.behaviour --results FILE            # records all runs, about 5 minutes on 2 cores
    python -m benchmarks.behaviour --against FILE            # makes them again and names those that differ

A run is known by the hash of its final weights and by its losses. Both are the same each time on one machine; on
another one they need not be.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import kept

PIPELINE = "parallel=pipeline parallel.num_micro_batches=2"
LM = "data.path=LICENSE model.width=32 model.num_layers=2 model.num_heads=2 model.context=16 train.global_batch_size=24"
MLP = "model.hidden_sizes=[48,48,48] train.global_batch_size=60"
# Name -> ranks, task, overrides; a run is resumed from the middle of the one that `from` names.
RUNS: dict[str, tuple[int, str, str]] = {
    "linear regression": (3, "linear_regression", "train.global_batch_size=60"),
    "mlp, one rank": (1, "mnist_mlp", MLP),
    "mlp": (2, "mnist_mlp", f"{MLP} train.checkpoint_every=3 train.keep_checkpoints=9"),
    "mlp, resumed": (3, "mnist_mlp", f"{MLP} from=mlp"),
    "mlp, micro-batches": (2, "mnist_mlp", f"{MLP} parallel.num_micro_batches=3"),
    "mlp, classes and augmentation": (2, "mnist_mlp", f"{MLP} data.balance=weight_loss data.max_shift=2"),
    "mlp, growing batch": (2, "mnist_mlp", f"{MLP} train.batch_schedule=noise_scale"),
    "cnn": (2, "mnist_cnn", "model.channels=[8,16] model.hidden_size=32 train.global_batch_size=53"),
    "language model": (2, "transformer_lm", LM),
    "gpipe": (2, "mnist_mlp", f"{MLP} {PIPELINE} parallel.schedule=gpipe"),
    "1f1b": (2, "transformer_lm", f"{LM} {PIPELINE} compression=topk compression.min_numel=64"),
    "interleaved": (
        2,
        "mnist_mlp",
        f"{MLP} {PIPELINE} parallel.schedule=interleaved parallel.virtual_stages_per_rank=2",
    ),
    "zb_h1": (2, "mnist_mlp", f"{MLP} {PIPELINE} parallel.schedule=zb_h1"),
    "hybrid": (3, "mnist_mlp", f"{MLP} {PIPELINE} parallel.replicas_per_stage=[2,1]"),
    "server": (3, "mnist_mlp", f"{MLP} parallel=parameter_server compression=int8"),
    "sharded": (2, "mnist_mlp", f"{MLP} optimizer=adamw optimizer.sharded=true"),
    **{name: (2, "mnist_mlp", f"{MLP} compression={name}") for name in ("topk", "powersgd", "sign", "dgc")},
    **{name: (2, "mnist_mlp", f"{MLP} precision={name}") for name in ("bf16", "fp16")},
    "adasum": (2, "mnist_mlp", f"{MLP} op=adasum"),
}
LENGTH = ("train.max_steps=6", "train.log_every=1")


def run(name: str, framework: str, folder: Path) -> dict[str, Any]:
    """Trains, and returns the hash of the weights and the losses."""
    num_ranks, task, overrides = RUNS[name]
    words = [word for word in overrides.split() if not word.startswith("from=")]
    for word in set(overrides.split()) - set(words):
        words.append(f"resume={folder / word.partition('=')[2]}/checkpoints/step-00000003")
    command = ["horovodrun", "--gloo", "-np", str(num_ranks), sys.executable, "-m", f"recipes.{task}_{framework}"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    job = subprocess.run([*command, *words, *LENGTH, f"run.dir={folder / name.replace(',', '')}"], **pipes)
    if job.returncode:
        sys.exit(job.stdout)
    lines = (folder / name.replace(",", "") / "metrics.jsonl").read_text().splitlines()
    losses = [event["train_loss"] for event in map(json.loads, lines) if "train_loss" in event]
    summary = json.loads((folder / name.replace(",", "") / "summary.json").read_text())
    return {"weights_sha256": summary["weights_sha256"], "losses": losses}


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frameworks", type=lambda text: text.split(","), default=["torch", "tf"])
    parser.add_argument("--runs", type=lambda text: text.split(";"), default=list(RUNS))
    parser.add_argument("--results", type=Path, metavar="FILE", help="what was recorded is kept there")
    parser.add_argument("--against", type=Path, metavar="FILE", help="what was recorded before")
    arguments = parser.parse_args()
    before = kept.load(arguments.against) if arguments.against else {}
    results: dict[str, Any] = {}
    for framework in arguments.frameworks:
        with tempfile.TemporaryDirectory() as folder:
            for name in arguments.runs:
                key = f"{name} ({framework})"
                results[key] = run(name, framework, Path(folder))
                same = results[key] == before.get(key)
                print(key, "" if not before else "same" if same else "DIFFERS", flush=True)
    if arguments.results:
        kept.keep(arguments.results, results)
    if before:
        sys.exit(any(results[key] != before.get(key) for key in results))


if __name__ == "__main__":
    main()

"""What benchmarks measured, kept in a file that runs of other cases add to."""

import argparse
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def add_option(parser: argparse.ArgumentParser, benchmark: str) -> None:
    """Adds the option that says where results are kept."""
    path = FOLDER / f"{benchmark}.json"
    text = f"what was measured is kept there; default: benchmarks/results/{path.name}"
    parser.add_argument("--results", type=Path, default=path, metavar="FILE", help=text)


def load(path: Path) -> dict[str, Any]:
    """What earlier runs left; nothing if there was none."""
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return results


def keep(path: Path, results: dict[str, Any]) -> None:
    """Puts the results in the place of the earlier ones."""
    path.write_text(json.dumps(results, indent=2) + "\n")

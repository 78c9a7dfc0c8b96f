"""Runs Horovod's own tests, from a checkout of v0.28.1, against the Horovod of this environment.

The sdist has no tests, so the checkout is the user's: git clone --branch v0.28.1 https://github.com/horovod/horovod
A test that fails without standing in EXPECTED, or stands there and does not fail, is an error.

    python install/horovod/upstream_tests.py FOLDER [SUITE ...]
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

MUON = "Horovod wraps each optimizer of torch.optim, and torch's Muon takes only matrices"
KERAS_2 = "the wrappers are for Keras 2"
NUMPY_2 = "NumPy 2 compares an error of 0 with 1e-8 in float16, where that is 0"
# Suite -> its framework, and the tests that fail on Horovod without our edits as well, each with the reason.
EXPECTED: dict[str, tuple[str, dict[str, str]]] = {
    "parallel/test_torch.py": (
        "torch",
        {"test_broadcast_state": MUON, "test_broadcast_state_options": MUON, "test_force_allreduce": MUON},
    ),
    "parallel/test_process_sets_static.py": ("torch", {}),
    "parallel/test_adasum_pytorch.py": ("torch", {}),
    "parallel/test_tensorflow.py": (
        "tensorflow",
        {
            "test_horovod_syncbn_cpu": KERAS_2,
            "test_partial_distributed_gradient_tape": KERAS_2,
        },
    ),
    "parallel/test_tensorflow_process_sets.py": (
        "tensorflow",
        {"test_horovod_reducescatter_grad_cpu_process_sets": NUMPY_2},
    ),
    "integration/test_elastic_torch.py": ("torch", {}),
}
# They post a name twice in a row and expect that the first tensor still waits then. With the event-driven loop it can
# be done already, and the second one waits for ever.
NEEDS_A_CYCLE = "duplicate_name_error"
SECONDS = 1200  # of a suite; longer is a hang


def run(suite: str, tests: Path, folder: Path, selection: str, **variables: str) -> dict[str, str]:
    """Runs a suite, on 2 ranks unless it starts jobs of its own; returns "passed", "failed" or "skipped" by test."""
    path = tests / suite
    xml = f"--junitxml={folder}/$HOROVOD_RANK.xml"
    pytest = f"timeout {SECONDS} {sys.executable} -m pytest -q -p no:cacheprovider {xml} -k '{selection}' {path}"
    launcher = [] if suite.startswith("integration") else ["horovodrun", "--gloo", "-np", "2"]
    (folder / "mock.py").write_text("from unittest.mock import *\n")  # the tests name it as it was before Python 3.3
    # The name common is that of a module of the tests, and that of our package.
    places = [folder, tests / "utils", path.parent]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places))} | variables
    output = subprocess.run(
        [*launcher, "sh", "-c", pytest], cwd=path.parent, env=environment, text=True, capture_output=True
    ).stdout
    results: dict[str, str] = {}
    for report in folder.glob("*.xml"):
        for case in ElementTree.parse(report).iter("testcase"):
            result = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
            name = f"{case.attrib['classname'].rpartition('.')[2]}.{case.attrib['name']}"
            has_failed = result in ("failure", "error") or results.get(name) == "failed"  # here, or on the other rank
            results[name] = "failed" if has_failed else result
    if not results and "deselected" not in output:
        print(output[-5000:])
        results["all of it"] = "failed"
    return results


def compare(suite: str, results: dict[str, str]) -> list[str]:
    """Prints the numbers of a suite; returns what is not as expected."""
    expected = EXPECTED[suite][1]
    failed = sorted(name for name, result in results.items() if result == "failed")
    reasons = {name: expected.get(name.rpartition(".")[2]) for name in results}
    numbers = [f"{list(results.values()).count(result)} {result}" for result in ("passed", "failed", "skipped")]
    print(f"{suite}: {', '.join(numbers)}", flush=True)
    for name in failed:
        print(f"  {name}: {reasons[name] or 'NOT EXPECTED'}", flush=True)
    known = {name.rpartition(".")[2] for name in failed}
    problems = [f"{suite} {name}: failed" for name in failed if not reasons[name]]
    problems += [f"{suite} {name}: did not fail, as expected" for name in expected.keys() - known]
    return problems


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkout of Horovod 0.28.1")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"by default all: {', '.join(EXPECTED)}")
    options = parser.parse_args(arguments)
    tests = options.folder.resolve() / "test"
    unknown = [suite for suite in options.suites if suite not in EXPECTED]
    if unknown or not (tests / "parallel").is_dir():
        parser.error(f"{unknown[0]}: not a suite" if unknown else f"{options.folder}: no tests of Horovod in it")
    problems = []
    for suite in options.suites or EXPECTED:
        if importlib.util.find_spec(EXPECTED[suite][0]) is None:
            print(f"{suite}: {EXPECTED[suite][0]} is not installed")
            continue
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            results = run(suite, tests, Path(first), f"not {NEEDS_A_CYCLE}")
            results |= run(suite, tests, Path(second), NEEDS_A_CYCLE, HOROVOD_EVENT_DRIVEN="0")
        problems += compare(suite, results)
    if problems:
        sys.exit("\n".join(["not as expected:", *problems]))


if __name__ == "__main__":
    main()

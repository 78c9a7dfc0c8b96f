"""Simulates runs: python -m tests.simulation seeds=0-999, or seed=7 to see all that happens in one."""

import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from tests.simulation import servers
from tests.simulation.scenario import drawn, problem_of, report, trace_of

MOST_REPORTS = 3


def main(words: list[str]) -> None:
    """Simulates the seeds that are asked for; status 1 if something went wrong."""
    word = " ".join(words) or "seeds=0-99"
    found = re.fullmatch(r"(seeds?)=(\d+)(?:-(\d+))?", word)
    if not found or int(found[3] or found[2]) < int(found[2]):
        print(f"{word}: must be seeds=FIRST-LAST, or seed=NUMBER to see all that happens with one", file=sys.stderr)
        sys.exit(2)
    key, first, last = found.groups()
    seeds, start = range(int(first), int(last or first) + 1), time.perf_counter()
    if key == "seed":
        print("\n".join([*trace_of(drawn(seeds[0]))[0], "with parameter servers:", *servers.trace_of(seeds[0])[0]]))
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        wrong = [
            seed for seed, problem in zip(seeds, pool.map(problem_of, seeds, chunksize=10), strict=True) if problem
        ]
    for seed in wrong[:MOST_REPORTS]:
        print(report(seed))
    print(f"{len(seeds)} seeds in {time.perf_counter() - start:.0f} s: {len(wrong)} went wrong {wrong[:20] or ''}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main(sys.argv[1:])

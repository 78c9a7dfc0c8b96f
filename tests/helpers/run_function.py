"""horovod.run: ranks run a function of this program, in a static and in an elastic job.

python -m tests.helpers.run_function
"""

import horovod


def tenfold(factor: int) -> int:
    """Runs on each rank."""
    from horovod.runner.common.util.env import get_env_rank_and_size

    rank, _ = get_env_rank_and_size()
    return 10 * rank + factor


if __name__ == "__main__":
    print("static", horovod.run(tenfold, args=(3,), num_proc=2))
    two_names = "localhost:1,127.0.0.1:1"
    elastic = horovod.run(
        tenfold, args=(5,), num_proc=2, min_num_proc=2, hosts=two_names, network_interfaces=["lo"], use_gloo=True
    )
    print("elastic", elastic)

"""A deterministic simulation of what keeps a run alive: clock, network and disk are simulated, the rules are ours.

world.py has the clock, the processes and their scheduler, threads.py locks and threads, disk.py files and what a power
cut leaves of them, network.py Horovod's collectives, training.py a small model in exact numbers, launcher.py Horovod's
own elastic driver and a plain launcher, servers.py the workers of parameter servers, and scenario.py draws what fails
from one seed, and checks what must never happen.

    python -m tests.simulation seeds=0-999
    python -m tests.simulation seed=7
"""

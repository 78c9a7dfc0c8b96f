"""Exchanging gradients over a slow network: plain, and compressed, of the recipes and of DistributedDataParallel.

    python -m benchmarks.slow_link                                # all comparisons, at 100 Mbit/s
    python -m benchmarks.slow_link --rate 1gbit mnist_mlp         # one
    python -m benchmarks.slow_link --sides none,fp16 mnist_mlp    # of some sides with plain DDP
    python -m benchmarks.slow_link --rate 10mbit -- python -m recipes.mnist_mlp_torch train.max_steps=50

Two hosts on one Linux machine: network namespaces, a and b, with an sshd each, joined by a link that both ends limit to
the rate. It adds no latency of its own. A real horovodrun starts one rank on each host. Needs root and, on Debian, the
packages iproute2, openssh-client and openssh-server; nothing of it outlives the program, and what a `kill -9` left
behind goes when it starts next.

The sides of a comparison take turns in one job, a block of steps each. A block's figure is the median of its steps, a
side's the median of its blocks; a round's ratio is that of two blocks of the same round. The bytes of a step are those
that left host a, headers and answers to what it received included: 7 % more than the gradients at 100 Mbit/s, where
packets are cut as on a wire, and less at 1 Gbit/s, where they stay larger. benchmarks/results/slow_link.json keeps what
was measured, unless --results names another file.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from unittest import mock

from benchmarks import kept
from benchmarks.side_by_side import Case, block, in_turn, write_text
from common.distributed.launcher_env import num_cores

P = ParamSpec("P")
T = TypeVar("T")

ROOT = Path(__file__).parent.parent
ROUNDS = 3
STEPS = 15
CASES = {"mnist_mlp": Case("mnist_mlp", STEPS, 32), "transformer_lm": Case("transformer_lm", STEPS, 6)}

BASELINE = "ddp"
PEERS = (BASELINE, "ddp_fp16", "ddp_powersgd")
METHODS = ("fp16", "bf16", "int8", "qsgd", "terngrad", "sign", "topk", "randomk", "dgc", "powersgd")
# Side of ours -> overrides of the recipe's configuration.
OURS: dict[str, tuple[str, ...]] = {"none": (), **{method: (f"compression={method}",) for method in METHODS}}
OURS["dgc"] += ("compression.warmup_steps=0",)  # a block has fewer steps than its warm-up
SIDES = [*PEERS, *OURS]

PREFIX = "horovod-slow-link-"  # of the names of all that is made here
HOSTS = {"a": "10.0.0.1", "b": "10.0.0.2"}
INTERFACE = "eth0"
PACKAGES = {
    "ip": "iproute2",
    "tc": "iproute2",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
}
PROGRAM_FOLDERS = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
SECONDS = 20  # for the sshds to answer, and for killed processes to be gone
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# $0 is the table of hosts. Only the command and what it starts see the mounts. sshd wants a /run/sshd.
ENTER_HOST = """
mount --bind "$0" /etc/hosts && mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd && exec "$@"
"""
SSHD_CONFIG = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
PubkeyAuthentication yes
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
"""
SSH_CONFIG = """
IdentityFile {folder}/key
IdentitiesOnly yes
IdentityAgent none
UserKnownHostsFile {folder}/known_hosts
GlobalKnownHostsFile none
StrictHostKeyChecking no
LogLevel ERROR
"""


def missing() -> str:
    """What the two hosts need and this machine lacks, and how to get it; empty when they can be made."""
    lacking = [program for program in PACKAGES if not shutil.which(program, path=PROGRAM_FOLDERS)]
    names = ["root (sudo)"] * (os.geteuid() != 0) + lacking
    packages = " ".join(sorted({PACKAGES[program] for program in lacking}))
    install = f"; apt-get install -y {packages}" if packages else ""
    return f"missing: {', '.join(names)}{install}" if names else ""


def call(*command: str) -> str:
    """Runs a program of the system and returns what it printed; its failure ends this program with a line."""
    environment = os.environ | {"PATH": PROGRAM_FOLDERS}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"slow_link: {shlex.join(command)}: {done.stderr.strip()}")
    return done.stdout


def on_host(host: str, folder: Path, *command: str) -> list[str]:
    """The command line that runs the command on a host."""
    program = shutil.which("ip", path=PROGRAM_FOLDERS) or "ip"
    return [program, "netns", "exec", PREFIX + host, "sh", "-c", ENTER_HOST, str(folder / host), *command]


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """A block that one process of this machine is in at a time, so that nobody clears away another's hosts."""
    with socket.socket(socket.AF_UNIX) as lock:
        try:
            lock.bind(f"\0{PREFIX}lock")  # an abstract name: the kernel takes it back however the process ends
        except OSError:
            sys.exit("slow_link: another one is running on this machine")
        yield


def clear() -> None:
    """Removes all that this program makes, of this process or an earlier one: processes, hosts, folders."""
    namespaces = [PREFIX + host for host in HOSTS]
    for namespace in set(namespaces).intersection(name.split()[0] for name in call("ip", "netns").splitlines()):
        deadline = time.monotonic() + SECONDS
        while (pids := call("ip", "netns", "pids", namespace).split()) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)
        call("ip", "netns", "delete", namespace)  # and with it its end of the link, and so the link
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        shutil.rmtree(left)


def leave_on_signal() -> None:
    """Makes signals that ask the program to end raise SystemExit, so that it clears up."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))


@contextlib.contextmanager
def two_hosts(rate: str) -> Iterator[Path]:
    """A block in which there are hosts a and b; gives a folder that both see and that goes with them."""
    with only_one():
        clear()
        try:
            leave_on_signal()
            folder = Path(tempfile.mkdtemp(prefix=PREFIX))
            make_link(rate)
            write_files(folder)
            start_sshds(folder)
            yield folder
        finally:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            clear()


def make_link(rate: str) -> None:
    """Makes the namespaces and the link between them."""
    for host in HOSTS:
        call("ip", "netns", "add", PREFIX + host)
    other_end = ["type", "veth", "peer", "name", INTERFACE, "netns", f"{PREFIX}b"]
    call("ip", "-n", f"{PREFIX}a", "link", "add", INTERFACE, *other_end)
    for host, address in HOSTS.items():
        ip = ["ip", "-n", PREFIX + host]
        call(*ip, "address", "add", f"{address}/24", "dev", INTERFACE)
        call(*ip, "link", "set", INTERFACE, "addrgenmode", "none")  # IPv4 alone, as in the table of hosts
        call(*ip, "link", "set", INTERFACE, "up")
        call(*ip, "link", "set", "lo", "up")
        queue = ["rate", rate, "burst", str(burst_bytes(rate)), "latency", "50ms"]
        call("tc", "-n", PREFIX + host, "qdisc", "add", "dev", INTERFACE, "root", "tbf", *queue)


def burst_bytes(rate: str) -> int:
    """What the link lets through at once after a pause: 1 ms of it, for more would make small messages free."""
    number, unit = re.fullmatch(r"(\d+)([kmg])bit", rate).groups()  # type: ignore[union-attr]
    bits_per_second = int(number) * {"k": 10**3, "m": 10**6, "g": 10**9}[unit]
    return max(10_000, bits_per_second // 8 // 1000)  # a few packets at least


def write_files(folder: Path) -> None:
    """Writes what the hosts need: their names, keys, and an ssh that knows nothing of the user's own."""
    addresses = "".join(f"{address} {host}\n" for host, address in HOSTS.items())
    for host, address in HOSTS.items():  # of its own name: Gloo uses that, not the interface
        (folder / host).write_text(f"127.0.0.1 localhost\n{addresses}{address} {socket.gethostname()}\n")
    for key in ("host_key", "key"):
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
    (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
    ssh = folder / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh", path=PROGRAM_FOLDERS)} -F {folder}/ssh_config "$@"\n')
    ssh.chmod(0o755)


def start_sshds(folder: Path) -> None:
    """Starts an sshd on each host and waits until they can be used."""
    sshd = shutil.which("sshd", path=PROGRAM_FOLDERS) or "sshd"  # it wants to be called by its whole path
    for host in HOSTS:
        log = folder / f"sshd_{host}.log"
        command = on_host(host, folder, sshd, "-D", "-f", str(folder / "sshd_config"), "-E", str(log))
        subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    for host in HOSTS:
        login = on_host("a", folder, str(folder / "bin" / "ssh"), "-o", "ConnectTimeout=2", host, "true")
        deadline = time.monotonic() + SECONDS
        while (done := subprocess.run(login, stdin=subprocess.DEVNULL, capture_output=True, text=True)).returncode:
            if time.monotonic() > deadline:
                log = folder / f"sshd_{host}.log"
                sys.exit(f"slow_link: ssh {host}: {done.stderr}{log.read_text() if log.exists() else ''}".strip())
            time.sleep(0.1)


def launch(folder: Path, command: Iterable[str], **pipes: Any) -> subprocess.CompletedProcess[str]:
    """Runs the command under horovodrun, one rank on each host."""
    hosts = ",".join(f"{host}:1" for host in HOSTS)
    options = ["--network-interfaces", INTERFACE, "--disable-cache"]  # the cache is in the user's home
    horovodrun = on_host("a", folder, "horovodrun", "--gloo", "-np", str(len(HOSTS)), "-H", hosts, *options, *command)
    path = [str(folder / "bin"), str(Path(sys.executable).parent), PROGRAM_FOLDERS]
    environment = {
        "OMP_NUM_THREADS": str(max(1, num_cores() // len(HOSTS))),  # each host counts all cores as its own
        **os.environ,
        "PATH": os.pathsep.join(path),
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "MASTER_ADDR": HOSTS["a"],
    }
    return subprocess.run(horovodrun, env=environment, cwd=ROOT, text=True, **pipes)


def bytes_sent() -> int:
    """The bytes that have left the host of this rank."""
    return int(Path("/sys/class/net", INTERFACE, "statistics/tx_bytes").read_text())


def counted(batches: Callable[P, Iterator[T]], counts: list[int]) -> Callable[P, Iterator[T]]:
    """The same batches; notes what has been sent when each is there.

    So the bytes of steps are told from those of starting and evaluating, which can be more.
    """

    def count(*args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        for batch in batches(*args, **kwargs):
            counts.append(bytes_sent())
            yield batch

    return count


def one_block(name: str, side: str, steps: int, folder: Path) -> tuple[float, float]:
    """Runs on each rank: a block of a side; seconds and bytes of a step."""
    from benchmarks.peers import torch_peers
    from common.training.run_log import RunLog

    case = dataclasses.replace(CASES[name], steps=steps, overrides=OURS.get(side, ()))
    trainer = "ours" if side in OURS else side
    counts: list[int] = []
    with (
        mock.patch.object(RunLog, "steps", counted(RunLog.steps, counts)),
        mock.patch.object(torch_peers, "steps", counted(torch_peers.steps, counts)),
    ):
        seconds = block(case, "torch", trainer, len(HOSTS), folder)
    return seconds, statistics.median(after - before for before, after in itertools.pairwise(counts))


def on_rank(name: str, sides: list[str], num_rounds: int, steps: int, folder: Path) -> None:
    """Runs on each rank; rank 0, on host a, prints seconds and bytes of a step in each side's blocks."""
    from common.torch.distributed import runtime

    topology = runtime.init()
    blocks: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for number in range(num_rounds):
        for place in in_turn(len(sides), number):
            blocks[sides[place]].append(one_block(name, sides[place], steps, folder))
    if topology.rank == 0:
        print("blocks", json.dumps(blocks), flush=True)


def measure(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """What was measured of each side of a case."""
    write_text(folder)
    work = ["--on-rank", str(folder), name, "--sides", ",".join(arguments.sides)]
    length = ["--rounds", str(arguments.rounds), "--steps", str(arguments.steps)]
    command = [sys.executable, "-m", "benchmarks.slow_link", *work, *length]
    output = launch(folder, command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
    if "blocks " not in output:
        sys.exit(output)
    blocks = json.loads(output.partition("blocks ")[2].splitlines()[0])
    return {side: row(blocks[side], blocks[BASELINE]) for side in arguments.sides}


def row(blocks: list[tuple[float, float]], baseline: list[tuple[float, float]]) -> dict[str, float]:
    """Figures of a side: milliseconds, bytes, and the ratio of its time to plain DDP's."""
    ratios = [seconds / other for (seconds, _), (other, _) in zip(blocks, baseline, strict=True)]
    return {
        "milliseconds": 1e3 * statistics.median(seconds for seconds, _ in blocks),
        "ratio": statistics.median(ratios),
        "smallest": min(ratios),
        "largest": max(ratios),
        "bytes_per_step": statistics.median(num_bytes for _, num_bytes in blocks),
    }


def compare(arguments: argparse.Namespace) -> None:
    """Measures the cases, prints the table and adds it to the results."""
    rate, results = arguments.rate, kept.load(arguments.results)
    print(f"| {rate} | side | ms of a step | side : {BASELINE} | smallest to largest | bytes of a step |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    with two_hosts(rate) as folder:
        for name in arguments.names or list(CASES):
            rows = measure(name, arguments, folder)
            results.setdefault(rate, {}).setdefault(name, {}).update(rows)
            kept.keep(arguments.results, results)
            for side, figures in rows.items():
                spread = f"{figures['smallest']:.2f} to {figures['largest']:.2f}"
                times = f"{figures['milliseconds']:.1f} | {figures['ratio']:.2f} | {spread}"
                print(f"| {name} | {side} | {times} | {figures['bytes_per_step']:,.0f} |", flush=True)


def a_rate(text: str) -> str:
    """A rate of the command line, as tc takes it."""
    if not re.fullmatch(r"[1-9]\d*[kmg]bit", text):
        raise argparse.ArgumentTypeError(f"{text} is not a rate such as 100mbit or 1gbit")
    return text


def some_sides(text: str) -> list[str]:
    """Sides of the command line, with the one that all are compared with."""
    wanted = {BASELINE, *text.split(",")}
    if unknown := wanted.difference(SIDES):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not among {', '.join(SIDES)}")
    return [side for side in SIDES if side in wanted]


def main() -> None:
    """Command line entry."""
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options, command = words[:end], words[end + 1 :]
    parser = argparse.ArgumentParser(usage="%(prog)s [options] [CASE ...] | %(prog)s [--rate RATE] -- COMMAND ...")
    parser.add_argument("names", nargs="*", metavar="CASE", choices=[*CASES, []], help=", ".join(CASES))
    parser.add_argument("--rate", type=a_rate, default="100mbit", help="of the link: 100mbit, 1gbit, ...")
    parser.add_argument("--sides", type=some_sides, default=SIDES, help=f"of {','.join(SIDES)}; {BASELINE} always")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--steps", type=int, default=STEPS, help="of a block")
    kept.add_option(parser, "slow_link")
    parser.add_argument("--on-rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(options)
    if arguments.on_rank:
        on_rank(arguments.names[0], arguments.sides, arguments.rounds, arguments.steps, arguments.on_rank)
        return
    if problem := missing():
        print(f"slow_link: {problem}", file=sys.stderr)
        sys.exit(2)
    if not command:
        compare(arguments)
        return
    with two_hosts(arguments.rate) as folder:
        status = launch(folder, command).returncode
    sys.exit(status)


if __name__ == "__main__":
    main()

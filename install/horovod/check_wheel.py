"""Tries the wheel of this environment as others get it: alone, in a new environment. `make wheel-check` calls this.

The frameworks come from pip, in the versions of this environment. Then `horovodrun --check-build` says what the wheel
is, and under `horovodrun -np 2` Horovod's own optimizers for PyTorch and for Keras leave equal weights on ranks whose
gradients differ.

    python -m install.horovod.check_wheel
"""

import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from install.horovod.wheel import installed_frameworks, setup_options, wheel_path

TORCH = """
import horovod.torch as hvd, torch
hvd.init()
torch.manual_seed(hvd.rank())
model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
before = model.weight.detach().clone()
inputs = torch.rand(8, 4)
for _ in range(3):
    optimizer.zero_grad()
    model(inputs).pow(2).mean().backward()
    optimizer.step()
alone = hvd.allgather(torch.autograd.grad(model(inputs).pow(2).mean(), model.weight)[0][None], name="gradients")
weights = hvd.allgather(model.weight.detach()[None], name="weights")
assert (weights == weights[0]).all() and (weights[0] != before).all() and not torch.allclose(alone[0], alone[1])
print("torch averages")
"""
KERAS = """
import horovod.tensorflow.keras as hvd, keras, numpy as np, tensorflow as tf
hvd.init()
keras.utils.set_random_seed(hvd.rank())
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
inputs = np.random.default_rng(hvd.rank()).random((8, 4))
begin = [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]
model.fit(inputs, inputs[:, :2], batch_size=4, epochs=2, verbose=0, callbacks=begin)
weights = hvd.allgather(model.layers[0].kernel.numpy()[None], name="weights")
assert (weights.numpy() == weights.numpy()[0]).all()
print("keras averages")
"""


def check(command: Sequence[object], expected: str) -> None:
    """Runs a command, which must print the expected words."""
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode or expected not in done.stdout:
        sys.exit(f"{done.stdout}\n{' '.join(map(str, command[:4]))} ended with status {done.returncode}")
    print(f"{expected}: as it should be", flush=True)


def frameworks() -> dict[str, str]:
    """Those of this environment: distribution -> version without its build."""
    installed = installed_frameworks()
    if any(name.startswith("tensorflow") for name in installed):
        installed["keras"] = metadata.version("keras")
    return {name: version.partition("+")[0] for name, version in installed.items()}


def main() -> None:
    """Command line entry."""
    wheel = wheel_path(*setup_options())
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        tools = Path(folder) / "bin"
        pins = [f"{name}=={version}" for name, version in frameworks().items()]
        subprocess.run([tools / "python", "-m", "pip", "install", "-q", *pins, wheel], check=True, cwd=folder)
        check([tools / "horovodrun", "--check-build"], wheel.name.split("-")[1])
        for name, script in (("torch", TORCH), ("keras", KERAS)):
            if name in frameworks():
                check([tools / "horovodrun", "-np", "2", tools / "python", "-c", script], f"{name} averages")


if __name__ == "__main__":
    main()

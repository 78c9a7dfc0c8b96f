"""Scripts of one's own in an elastic job: lost ranks and new ones change nothing of what they come to."""

import sys
from pathlib import Path

from tests.helpers.launch import FRAMEWORKS, elastic_options, horovodrun, run
from tests.helpers.pages import PAGES, numbers

import pytest

# Rank 1 is lost at its 25th batch; when its host is used again, another one joins.
LOSE = """
import itertools, os, signal, time
calls = itertools.count(1)
def lose():
    time.sleep(0.05)
    if next(calls) == 25 and os.environ.get("HOROVOD_RANK") == "1" and not os.path.exists("lost"):
        open("lost", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
"""
KERAS = """
from horovod_recipes import fit
import keras
import numpy as np
fit.init(seed=1)
random = np.random.default_rng(1)
x, y = random.normal(size=(300, 8)).astype("float32"), random.integers(3, size=300)
model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "gelu"), keras.layers.Dense(3)])
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
fit.distribute(model)
class Slow(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        lose()
backup = keras.callbacks.BackupAndRestore("backup", double_checkpoint=True, delete_checkpoint=False)
callbacks = [backup, Slow()]
model.fit(x, y, batch_size=30, epochs=8, shuffle=False, callbacks=callbacks, verbose=0)
print("losses:", *[model.evaluate(x[place::6], y[place::6], verbose=0) for place in range(6)])
"""


def script_of(framework: str) -> str:
    """A script that loses a rank."""
    if framework == "tf":
        return LOSE + KERAS
    page = PAGES["elastic"].replace("shuffle=True)", "shuffle=True, num_workers=1)")  # a process that is left behind
    return LOSE + page.replace("        optimizer.step()\n", "        optimizer.step()\n        lose()\n")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_script_goes_on_when_ranks_leave_and_join(framework: str, tmp_path: Path) -> None:
    outputs = []
    for name in ("alone", "elastic"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "script.py").write_text(script_of(framework))
        if name == "alone":
            job = run([sys.executable, "script.py"], cwd=folder)
        else:
            hosts = ["--max-np", "2", "--blacklist-cooldown-range", "1", "2"]
            job = horovodrun(2, "script.py", options=[*elastic_options(folder, 1), *hosts], cwd=folder)
        assert job.returncode == 0, job.stdout
        outputs.append(job.stdout)
    alone, elastic = outputs
    assert "a rank is lost: the script starts again" in elastic
    assert "ranks join or leave: the script starts again" in elastic
    assert "Traceback" not in elastic
    assert numbers(elastic)[:6] == pytest.approx(numbers(alone), rel=1e-5)

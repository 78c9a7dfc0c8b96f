"""How the rules of common/ are carried out with Keras 3 on TensorFlow.

To be imported before keras and tensorflow: what they read from the environment is set here.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from common.extras import require


@contextmanager
def _without_greetings() -> Iterator[None]:
    """Drops the informational lines that TensorFlow's libraries write to stderr while they load.

    They do so before TF_CPP_MIN_LOG_LEVEL counts, on every rank; warnings and errors are passed on.
    """
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            for line in written:
                if not line.startswith((b"I0000 ", b"WARNING: All log messages before absl::")):
                    sys.stderr.write(line.decode(errors="replace"))


require("tf", "tensorflow", "keras", "horovod")
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors only
with _without_greetings():
    import tensorflow  # noqa: F401

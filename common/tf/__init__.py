"""The version of the framework-dependent parts for Keras 3 on TensorFlow.

It must be imported before keras and tensorflow, because it sets environment variables that they read.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from common.distributed.extras import require


@contextmanager
def _without_greetings() -> Iterator[None]:
    """Drops the informational lines that TensorFlow's libraries write to stderr while they load.

    TF_CPP_MIN_LOG_LEVEL has no effect on them yet. Warnings and errors are still printed.
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

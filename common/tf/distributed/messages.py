"""Messages from one rank to another, which need no other rank and no negotiation.

Within a host they go through memory that the two ranks share, otherwise through a connection. Messages of one name
between two ranks arrive in the order of sending. None of these functions may be called in a graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf


@dataclass(frozen=True)
class Incoming:
    """A message that is being received.

    Attributes:
        handle: Horovod's number of it.
        content: the memory into which it is received.
    """

    handle: int
    content: np.ndarray

    def wait(self) -> tf.Tensor:
        """Waits for the message; returns its values."""
        wait_any([self])
        return self.values

    @property
    def values(self) -> tf.Tensor:
        """The values of a message that has arrived."""
        return tf.convert_to_tensor(self.content)


def send(name: str, values: tf.Tensor, receiver: int) -> None:
    """Sends values to a rank; returns before they have arrived."""
    hvd.send(values.numpy(), receiver, name)


def receive(name: str, like: tf.TensorSpec, sender: int) -> Incoming:
    """Starts to receive the message of this name from a rank; `like` has its shape and dtype."""
    content = np.empty(like.shape, like.dtype.as_numpy_dtype)
    return Incoming(hvd.receive(content, sender, name), content)


def wait_any(messages: Sequence[Incoming]) -> int:
    """Waits until one of the messages has arrived; returns its index. The others are still expected.

    Raises:
        HorovodInternalError: a sender has exited, or Horovod has been shut down.
    """
    return hvd.wait_any([message.handle for message in messages])

"""Messages from one rank to another, which need no other rank and no negotiation.

Within a host they go through memory that the two ranks share, otherwise through a connection. Messages of one name
between two ranks arrive in the order of sending.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import horovod.torch as hvd
import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Incoming:
    """A message that is being received.

    Attributes:
        handle: Horovod's number of it.
        content: the memory into which it is received, on the CPU.
        device: the device of its values.
    """

    handle: int
    content: Tensor
    device: torch.device

    def wait(self) -> Tensor:
        """Waits for the message; returns its values."""
        wait_any([self])
        return self.values

    @property
    def values(self) -> Tensor:
        """The values of a message that has arrived."""
        return self.content.to(self.device)


def send(name: str, values: Tensor, receiver: int) -> None:
    """Sends values to a rank; returns before they have arrived, and the tensor may change then."""
    hvd.send(_bytes(values.detach().cpu().contiguous()), receiver, name)


def receive(name: str, like: Tensor, sender: int) -> Incoming:
    """Starts to receive the message of this name from a rank; `like` has its shape, dtype and device."""
    content = torch.empty_like(like, device="cpu")
    return Incoming(hvd.receive(_bytes(content), sender, name), content, like.device)


def wait_any(messages: Sequence[Incoming]) -> int:
    """Waits until one of the messages has arrived; returns its index. The others are still expected.

    Raises:
        HorovodInternalError: a sender has exited, or Horovod has been shut down.
    """
    return hvd.wait_any([message.handle for message in messages])


def _bytes(values: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor."""
    return values.view(-1).view(torch.uint8).numpy()

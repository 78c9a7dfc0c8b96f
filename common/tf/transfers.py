"""Messages between two ranks, several of them under way at the same time."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from common.passage import Passage
from common.tf import runtime

import horovod.tensorflow as hvd
import tensorflow as tf


class Transfers:
    """Broadcasts to two ranks, each in a thread that waits for it.

    Horovod matches messages by name, and outside of graphs all broadcasts of TensorFlow have the same one: each message
    is a graph of its own. In a graph of more, TensorFlow drops messages whose result is not used, and sends constants
    before the graph runs.

    Args:
        passage: a step of which has all messages that can be under way at a time.
    """

    def __init__(self, passage: Passage) -> None:
        self._rank = passage.topology.rank
        most = sum(action.kind.is_transfer for action in passage.actions())
        self._threads = ThreadPoolExecutor(max(1, most), thread_name_prefix="transfers")
        self._messages: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {}

    def send(self, name: str, values: tf.Tensor, receiver: int) -> Future[tf.Tensor]:
        """Sends (B, ...) to a rank; B may differ from one time to the next."""
        return self._start(name, values, self._rank, receiver)

    def receive(self, name: str, like: tf.Tensor, sender: int) -> Future[tf.Tensor]:
        """Receives what a rank sends under a name, like a tensor (B, ...)."""
        return self._start(name, like, sender, sender)

    def _start(self, name: str, values: tf.Tensor, sender: int, peer: int) -> Future[tf.Tensor]:
        if name not in self._messages:
            self._messages[name] = _message(name, values, sender, sorted((self._rank, peer)))
        return self._threads.submit(self._messages[name], values)


def _message(name: str, like: tf.Tensor, sender: int, pair: list[int]) -> Callable[[tf.Tensor], tf.Tensor]:
    @tf.function(input_signature=[tf.TensorSpec((None, *like.shape[1:]), like.dtype)], autograph=False)
    def broadcast(values: tf.Tensor) -> tf.Tensor:
        return hvd.broadcast(values, sender, name=name, process_set=runtime.process_set(pair))

    return broadcast.get_concrete_function()

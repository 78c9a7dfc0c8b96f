"""Messages between two ranks, several of them under way at the same time."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread

from common.tf import runtime

import horovod.tensorflow as hvd
import tensorflow as tf

Message = Callable[[tf.Tensor], tf.Tensor]


class Transfers:
    """Broadcasts to two ranks, each in a thread that waits for it; none keeps this rank from leaving.

    Horovod matches messages by name, and outside of graphs all broadcasts of TensorFlow have the same one: each message
    is a graph of its own. In a graph of more, TensorFlow drops messages whose result is not used, and sends constants
    before the graph runs.

    Args:
        rank: this rank.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._messages: dict[str, Message] = {}

    def send(self, name: str, values: tf.Tensor, receiver: int) -> "Future[tf.Tensor]":
        """Sends (B, ...) to a rank; B may differ from one time to the next."""
        return self._start(name, values, self._rank, receiver)

    def receive(self, name: str, like: tf.Tensor, sender: int) -> "Future[tf.Tensor]":
        """Receives what a rank sends under a name, like a tensor (B, ...)."""
        return self._start(name, like, sender, sender)

    def _start(self, name: str, values: tf.Tensor, sender: int, peer: int) -> "Future[tf.Tensor]":
        if name not in self._messages:
            self._messages[name] = _message(name, values, sender, sorted((self._rank, peer)))
        result: Future[tf.Tensor] = Future()
        Thread(target=_run, args=(self._messages[name], values, result), name=name, daemon=True).start()
        return result


def _run(message: Message, values: tf.Tensor, result: "Future[tf.Tensor]") -> None:
    try:
        result.set_result(message(values))
    except BaseException as error:
        result.set_exception(error)


def _message(name: str, like: tf.Tensor, sender: int, pair: list[int]) -> Message:
    @tf.function(input_signature=[tf.TensorSpec((None, *like.shape[1:]), like.dtype)], autograph=False)
    def broadcast(values: tf.Tensor) -> tf.Tensor:
        return hvd.broadcast(values, sender, name=name, process_set=runtime.process_set(pair))

    return broadcast.get_concrete_function()

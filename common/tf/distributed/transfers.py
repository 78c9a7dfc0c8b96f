"""Point-to-point messages between ranks, several at the same time."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread

from common.tf.distributed import runtime

import horovod.tensorflow as hvd
import tensorflow as tf

Message = Callable[[tf.Tensor], tf.Tensor]


class Transfers:
    """Point-to-point messages as broadcasts in a set of two ranks; a daemon thread waits for each of them.

    Horovod matches messages by name, and outside of graphs all broadcasts of TensorFlow have the same name. So each
    message is a separate graph. In a larger graph, TensorFlow would drop messages whose result is not used, and send
    constants before the graph runs.

    Args:
        rank: the number of this rank.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._messages: dict[str, Message] = {}

    def send(self, name: str, values: tf.Tensor, receiver: int) -> "Future[tf.Tensor]":
        """Sends values (B, ...) to a rank; B may differ from call to call."""
        return self._start(name, values, self._rank, receiver)

    def receive(self, name: str, like: tf.Tensor, sender: int) -> "Future[tf.Tensor]":
        """Receives the message of this name from a rank; `like` (B, ...) has its shape and dtype."""
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

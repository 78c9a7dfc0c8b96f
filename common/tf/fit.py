"""Data-parallel model.fit for your own script (docs/your-own-script.md)."""

import itertools
from collections.abc import Sequence
from typing import Any

from common.config.schema import ReduceOp
from common.data import batches
from common.distributed.topology import Topology
from common.gradients import bucketing
from common.gradients.gradient_sync import NO_COMPRESSION
from common.tf.distributed import runtime
from common.tf.gradients.buckets import BucketBuffers

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf


def distributed(optimizer: keras.Optimizer) -> keras.Optimizer:
    """Makes the optimizer use the mean gradient of all ranks; returns the same optimizer.

    In fit, the gradients of the ranks are weighted by their numbers of examples (see Synchronise); if the optimizer is
    called directly, their plain mean is used. The optimizer keeps its class and is saved as usual.
    """
    if not _is_distributed(optimizer):
        optimizer.apply = _ApplyMean(optimizer, runtime.init())
    return optimizer


class _ApplyMean:
    """Replaces the method `apply` of an optimizer.

    Attributes:
        num_examples: () int32, number of examples of this rank's next gradient, which is their mean; None: all ranks
            have the same weight.
    """

    def __init__(self, optimizer: keras.Optimizer, topology: Topology) -> None:
        self.num_examples: tf.Tensor | None = None
        self._apply = optimizer.apply
        self._topology = topology

    def __call__(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        num_examples, self.num_examples = self.num_examples, None
        # With one rank, too: Keras squares a sparse gradient before it sums repeated rows.
        dense = [None if gradient is None else _dense(gradient) for gradient in grads]
        if self._topology.num_replicas > 1:
            dense = self._mean(dense, 1 if num_examples is None else num_examples)
        self._apply(dense, trainable_variables)

    def _mean(self, grads: Sequence[tf.Tensor | None], num_examples: int | tf.Tensor) -> list[tf.Tensor | None]:
        """The mean gradients; None stays None, and Keras warns about it or raises an error."""
        given = [gradient for gradient in grads if gradient is not None]
        # A message has one dtype, and sums of many float16 values would overflow.
        dtype = tf.float64 if any(gradient.dtype == tf.float64 for gradient in given) else tf.float32
        weight = tf.cast(num_examples, dtype)
        # The gradient of a placeholder may be NaN.
        weighted = [tf.math.multiply_no_nan(tf.cast(gradient, dtype), weight) for gradient in given]
        total, *sums = _sum_over_ranks([weight, *weighted], self._topology)
        means = (tf.cast(value / total, gradient.dtype) for value, gradient in zip(sums, given, strict=True))
        return [None if gradient is None else next(means) for gradient in grads]


def _sum_over_ranks(tensors: Sequence[tf.Tensor], topology: Topology) -> list[tf.Tensor]:
    """The sums over the ranks of tensors of one dtype, with one message per bucket."""
    if topology.world_size == 1 or not tensors:
        return list(tensors)
    shapes, dtype = [tuple(tensor.shape) for tensor in tensors], tensors[0].dtype
    buckets = bucketing.of_model(shapes, dtype.size, NO_COMPRESSION, ReduceOp.average, bucketing.BUCKET_BYTES)
    buffers = BucketBuffers(shapes, buckets, dtype)
    summed = [
        hvd.allreduce(flat, name=f"gradients.{number}", op=hvd.Sum) for number, flat in enumerate(buffers.pack(tensors))
    ]
    return buffers.unpack(summed)


def _dense(gradient: tf.Tensor | tf.IndexedSlices) -> tf.Tensor:
    """The gradient as a dense tensor; that of an embedding has rows and their numbers, which differ between ranks."""
    return tf.ensure_shape(tf.convert_to_tensor(gradient), gradient.shape)


def _is_distributed(optimizer: keras.Optimizer | None) -> bool:
    return isinstance(getattr(optimizer, "apply", None), _ApplyMean)


class Synchronise(keras.callbacks.Callback):
    """A callback that makes fit data-parallel; fit and evaluate then report values over the examples of all ranks.

    - Training begins with rank 0's weights and optimizer state.
    - A rank's gradient is weighted by its number of examples in the step, so that each step is the same as that of one
      rank with the global batch.
    - At the end of an epoch or evaluation, the metrics' variables are summed over the ranks before Keras computes the
      results. So all ranks see the same values, to the bit, for any order of the callbacks. Progress within an epoch is
      that of each rank.
    - At the end of an epoch, the layers' running statistics (BatchNormalization) are averaged.
    - At the end of training, all ranks compare their weights.

    Args:
        additive: user-defined classes of metrics whose variables all begin at 0 and are sums over examples. Keras'
            metrics are always accepted.

    Raises:
        ValueError: before training, if data-parallel training would not be exact.
        TrainingError: at the end of training, if ranks hold different weights.
    """

    def __init__(self, additive: Sequence[type[keras.Metric]] = ()) -> None:
        super().__init__()
        self._additive = tuple(additive)
        self._topology = runtime.init()
        self._training = self._testing = self._checked_metrics = False

    def set_model(self, model: keras.Model) -> None:
        """Prepares the model's step before Keras traces it."""
        if model is not self.model:
            if not isinstance(getattr(model.compute_loss, "__self__", None), _WeighedStep):
                _WeighedStep(model)
            if self._topology.num_replicas > 1 and model.jit_compile:
                model.jit_compile = False  # XLA has no kernels for Horovod's operations
            model.train_function = None  # the existing one may have been traced without this callback
        super().set_model(model)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Checks that training would be exact, and broadcasts rank 0's weights and optimizer state."""
        self._training, self._testing, self._checked_metrics = True, False, False
        _check_compiled(self.model)
        _check_steps(self.params["steps"])
        if not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)
        runtime.broadcast_state(self.model, self.model.optimizer)
        self._begin_summing()

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Checks the metrics as soon as Keras has built them, in the first step."""
        if batch and not self._checked_metrics:
            self._check_metrics()

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Begins an evaluation, within training or separately."""
        self._testing = True
        if not self._training:
            self._begin_summing()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Ends an evaluation."""
        self._testing = False
        if not self._training:
            self._end_summing()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Compares the weights of all ranks."""
        self._training = False
        self._end_summing()
        runtime.assert_weights_in_sync(self.model)

    def _begin_summing(self) -> None:
        """Wraps the method by which Keras computes the results of an epoch or an evaluation.

        Keras has no public interface for this: callbacks only get a copy of the results that evaluate returns. The
        private method is that of Keras 3.15.
        """
        self._end_summing()
        of_this_rank = self.model._get_metrics_result_or_logs

        def of_all_ranks(logs: dict[str, Any]) -> dict[str, Any]:
            self._check_metrics()
            self._sum_metrics()
            if not self._testing:
                self._average_statistics()
            results: dict[str, Any] = of_this_rank(logs)
            if results is logs:
                raise ValueError(
                    "the model's own train_step or test_step must return the values of its metrics: other values "
                    f"cannot be summed over the ranks. Received: {sorted(logs)}, "
                    f"metrics: {sorted(self.model.get_metrics_result())}"
                )
            return results

        self.model._get_metrics_result_or_logs = of_all_ranks

    def _end_summing(self) -> None:
        self.model.__dict__.pop("_get_metrics_result_or_logs", None)

    def _check_metrics(self) -> None:
        self._checked_metrics = True
        problems = [
            f"{metric.name} ({type(metric).__name__})" for metric in _metrics(self.model) if not self._adds_up(metric)
        ]
        if problems:
            raise ValueError(
                f"metrics that may not add up over the ranks: {', '.join(problems)}. If all their variables begin at 0 "
                "and only have sums over examples added to them, pass Synchronise(additive=[the classes])."
            )

    def _adds_up(self, metric: keras.Metric) -> bool:
        names = {variable.name for variable in metric.variables}
        is_a_sum = isinstance(metric, keras.metrics.Mean | keras.metrics.Sum) and names <= {"total", "count"}
        return is_a_sum or type(metric).__module__.startswith("keras.") or isinstance(metric, self._additive)

    def _sum_metrics(self) -> None:
        """Sums the metrics' variables: each rank then has the state that one rank would have after all examples."""
        variables = _variables(self.model)
        for variable, value in zip(variables, self._sums(variables), strict=True):
            variable.assign(tf.cast(value, variable.dtype))

    def _average_statistics(self) -> None:
        variables = [variable for variable in self.model.non_trainable_weights if "float" in variable.dtype]
        for variable, value in zip(variables, self._sums(variables), strict=True):
            variable.assign(tf.cast(value / self._topology.num_replicas, variable.dtype))

    def _sums(self, variables: Sequence[keras.Variable]) -> list[tf.Tensor]:
        """The sums over the ranks in float64, in which the mean of equal numbers is exact."""
        return _sum_over_ranks([tf.cast(variable.value, tf.float64) for variable in variables], self._topology)


class _WeighedStep:
    """Replaces the methods `compute_loss` and `compute_metrics` of a model.

    It gives the optimizer the number of examples of the loss, which is their mean. Without examples, the batch is a
    placeholder (see ShardedBatches): the loss is 0, and the step does not change the metrics.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._compute_loss, self._compute_metrics = model.compute_loss, model.compute_metrics
        self._before: dict[int, tf.Tensor] = {}
        model.compute_loss, model.compute_metrics = self.compute_loss, self.compute_metrics

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> tf.Tensor:
        num_rows = _num_rows((x, y_pred))
        num_examples = _num_rows((y, x, y_pred))
        if training and _is_distributed(self._model.optimizer):
            self._model.optimizer.apply.num_examples = num_examples
        self._before = {id(variable): tf.identity(variable.value) for variable in _variables(self._model)}
        arguments = (x, _filled(y, num_rows), y_pred, _filled(sample_weight, num_rows))
        has_training = {"training": training} if self._model._compute_loss_has_training_arg else {}
        return tf.where(num_examples > 0, self._compute_loss(*arguments, **has_training), 0)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        num_rows = _num_rows((x, y_pred))
        results: dict[str, Any] = self._compute_metrics(
            x, _filled(y, num_rows), y_pred, _filled(sample_weight, num_rows)
        )
        before, self._before = self._before, {}
        for variable in _variables(self._model) if before else []:
            old = before.get(id(variable), tf.zeros_like(variable.value))  # created only now
            variable.assign(tf.where(_num_rows((y, x, y_pred)) > 0, variable.value, old))
        return results


def _num_rows(nest: Any) -> tf.Tensor:
    """The number of rows of the first tensor, () int32."""
    return tf.shape(next(tensor for tensor in keras.tree.flatten(nest) if tensor is not None))[0]


def _filled(nest: Any, num_rows: tf.Tensor) -> Any:
    """The tensors; those without rows get num_rows rows of zeros."""

    def fill(tensor: Any) -> Any:
        if tensor is None:
            return None
        missing = tf.where(tf.shape(tensor)[0] == 0, num_rows, 0)
        return tf.pad(tensor, [[0, missing], *[[0, 0]] * (len(tensor.shape) - 1)])

    return keras.tree.map_structure(fill, nest)


def _metrics(model: keras.Model) -> list[keras.Metric]:
    """All metrics of the model; those that were given to compile are in a container."""
    return [inner for metric in model.metrics for inner in getattr(metric, "metrics", [metric])]


def _variables(model: keras.Model) -> list[keras.Variable]:
    """The variables of all metrics of the model."""
    return [variable for metric in model.metrics for variable in metric.variables]


def _check_compiled(model: keras.Model) -> None:
    """Checks that the steps of a model on many ranks would be the same as on one rank.

    Raises:
        ValueError: they would not; the message has the remedy.
    """
    if not _is_distributed(model.optimizer):
        raise ValueError(
            "model.compile needs optimizer=distributed(optimizer), or the ranks would train on their own. With "
            "mixed_float16, where Keras puts a LossScaleOptimizer around it, "
            "optimizer=distributed(keras.optimizers.LossScaleOptimizer(optimizer))"
        )
    if not model.built:
        raise ValueError(
            "the model has no weights yet that all ranks could begin with: begin it with keras.Input or call "
            "model.build before fit"
        )
    for loss in keras.tree.flatten(model.loss):
        if isinstance(loss, keras.Loss) and loss.reduction not in ("sum_over_batch_size", "mean"):
            raise ValueError(
                f"a loss must be a mean over the examples for ranks to weight it by their numbers: "
                f"reduction='sum_over_batch_size'. Received: {type(loss).__name__}(reduction={loss.reduction!r})"
            )


def _check_steps(num_steps: int | None) -> None:
    """Checks that all ranks take the same number of steps in an epoch; otherwise some would wait forever.

    Raises:
        ValueError: the ranks' numbers of steps differ or are unknown.
    """
    everyones = runtime.allgather_object(num_steps)
    if None in everyones or len(set(everyones)) > 1:
        raise ValueError(
            f"all ranks must take the same number of steps in an epoch; if Keras cannot tell it, pass steps_per_epoch. "
            f"Received: {everyones}"
        )


class ShardedBatches(keras.utils.PyDataset):
    """This rank's part of each global batch, in the same order as in the recipes; call fit with shuffle=False.

    The batches of an epoch are consecutive pieces of a permutation of the examples; the ranks' parts of a batch differ
    by at most one example. In an epoch's last step a rank may have no examples: it then takes part with a placeholder,
    an input without a target, which Synchronise does not count.

    Args:
        x: inputs as numpy arrays, each (N, ...); one array, or any nest of arrays.
        y: targets likewise.
        global_batch_size: number of examples per step over all ranks; an epoch's last step has the remaining ones.
        topology: the place of this rank.
        seed: determines the order together with the epoch.
        shuffle: False keeps the order of the arrays, for evaluation.
        sample_weight: (N,) or None.
        epoch: the first epoch, from 1; to resume after an interruption, fit's initial_epoch + 1.
    """

    def __init__(
        self,
        x: Any,
        y: Any,
        global_batch_size: int,
        topology: Topology,
        *,
        seed: int = 0,
        shuffle: bool = True,
        sample_weight: np.ndarray | None = None,
        epoch: int = 1,
    ) -> None:
        super().__init__()
        self._arrays = (x, y) if sample_weight is None else (x, y, sample_weight)
        sizes = {len(array) for array in keras.tree.flatten(self._arrays)}
        if len(sizes) > 1:
            raise ValueError(f"all arrays must have the same number of examples. Received: {sorted(sizes)}")
        self._num_examples, self._global_batch_size, self._topology = sizes.pop(), global_batch_size, topology
        self._seed, self._shuffle, self._epoch = seed, shuffle, epoch
        self._within_epoch = False
        self._prepare()

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, index: int) -> Any:
        is_early = index - next(self._calls) >= max(1, self.workers)
        if self._within_epoch and is_early and not self.use_multiprocessing:
            raise ValueError(
                "fit(..., shuffle=False), please: with shuffle=True, which is its default, each rank would take the "
                "steps in an order of its own. The examples are shuffled within ShardedBatches."
            )
        examples, _ = self._steps[index]
        x, *others = keras.tree.map_structure(lambda array: array[examples], self._arrays)
        if not len(examples):  # many layers fail without any input, such as TensorFlow's convolutions
            x = keras.tree.map_structure(lambda array: array[:1], self._arrays[0])
        return x, *others

    def on_epoch_begin(self) -> None:
        """Called by Keras when an epoch begins; worker threads, if any, have started before."""
        self._within_epoch = True

    def on_epoch_end(self) -> None:
        """Called by Keras at the end of an epoch, and also before the first epoch."""
        self._epoch += self._within_epoch
        self._within_epoch = False
        self._prepare()

    def _prepare(self) -> None:
        self._calls = itertools.count()
        self._steps = batches.of_epoch(
            self._num_examples, self._global_batch_size, self._topology, self._seed, self._epoch, self._shuffle
        )

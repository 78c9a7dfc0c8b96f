"""Data-parallel model.fit, model.evaluate and model.predict of Keras in a script of your own."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from common.distributed import launcher_env, noise_kind
from common.distributed.restart import Restart
from common.distributed.topology import Topology
from common.errors import ConfigError
from common.gradients.gradient_sync import SyncOptions
from common.tf.distributed import runtime
from common.tf.script import callbacks, checks, noise, probe, statistics
from common.tf.script.call import Call, facts
from common.tf.script.exchange import find_optimizers
from common.tf.script.ranks import Ranks
from common.tf.script.results import Results
from common.tf.script.tape import data_parallel, sum_metrics

import keras
import tensorflow as tf
from keras.src.backend.common.keras_tensor import KerasTensor

__all__ = ["data_parallel", "distribute", "init", "own_batches", "sum_metrics"]

_NAME = "_horovod_ranks"  # the attribute of a distributed model


def init(seed: int = 0, noise: str = "batch") -> Topology:
    """Starts Horovod and seeds Python, NumPy and TensorFlow alike on all ranks; to be called before the data are made.

    Args:
        seed: as that of keras.utils.set_random_seed.
        noise: "batch": dropout and noise are the rows of what one rank would draw for the global batch, so each rank
            draws for all of it. "rank": a rank draws for its rows alone, which costs less with many ranks.

    Returns:
        The place of this rank: rank, world_size, local_rank, local_size.
    """
    _restart()
    topology = runtime.init()
    with checks.refusals(topology):
        noise_kind.choose(noise)
    keras.utils.set_random_seed(seed)
    if topology.world_size > 1:
        _warn_of_other_models()
    return topology


@functools.cache
def _restart() -> Restart:
    return Restart(runtime)


@functools.cache
def _warn_of_other_models() -> None:
    fit = keras.Model.fit

    @functools.wraps(fit)
    def fit_or_warn(self: keras.Model, *args: Any, **kwargs: Any) -> Any:
        if _NAME not in self.__dict__:
            warnings.warn(
                f"{type(self).__name__}.fit: this model is not distributed; each rank trains a model of its own on "
                "all data. Call distribute(model) after model.compile.",
                stacklevel=2,
            )
        return fit(self, *args, **kwargs)

    keras.Model.fit = fit_or_warn


def distribute(
    model: keras.Model,
    *,
    compression: str | Mapping[str, Any] = "none",
    op: str = "average",
    additive: Sequence[type[keras.Metric]] = (),
    seed: int = 0,
) -> keras.Model:
    """Makes fit, evaluate and predict of a compiled model work on all ranks; returns the same model.

    Everything else stays as it is for one process: batch_size is the global one, each rank computes its rows of every
    batch, and losses, metrics and weights are those of one rank that computes all rows. With one rank nothing changes.

    Args:
        model: a compiled model.
        compression: of the gradients: a name of conf/compression/, or {"name": "topk", "ratio": 0.01}.
        op: average or adasum.
        additive: your own classes of metrics whose variables begin at 0 and are sums over examples.
        seed: of the compression's random numbers.

    Raises:
        SystemExit: with status 2 on all ranks, if training would not be exact; rank 0 prints why.
    """
    topology = runtime.init()
    is_shared = topology.world_size > 1 or launcher_env.is_elastic()  # or will be
    if is_shared and _NAME not in model.__dict__:
        with checks.refusals(topology):
            model.__dict__[_NAME] = _Distributed(model, topology, compression, op, additive, seed)
    return model


def own_batches(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Marks a dataset that is already divided: each rank's batches are its own rows of the global batches."""
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return dataset.with_options(options)


class _Distributed:
    """Replaces methods of a model; see distribute."""

    def __init__(
        self,
        model: keras.Model,
        topology: Topology,
        compression: str | Mapping[str, Any],
        op: str,
        additive: Sequence[type[keras.Metric]],
        seed: int,
    ) -> None:
        options = SyncOptions.from_names(compression, op, seed)
        if not model.compiled:
            raise ConfigError([f"distribute({model.name}): call model.compile before it"])
        if any(tensor.shape[0] is not None for tensor in keras.tree.flatten(getattr(model, "inputs", None) or [])):
            raise ConfigError([f"{model.name}: ranks get parts of a batch; give keras.Input no fixed batch_size"])
        self._model, self._topology, self._ranks = model, topology, Ranks(topology, options)
        self._results = Results(model, topology, additive)
        self._is_fitting = self._is_testing = self._is_alone = False
        self._own: list[bool] = []
        self._facts: dict[str, Any] = {}
        self._functions: dict[str, Any] = {"test_function": None, "predict_function": None}  # of one rank alone
        self._plain = {name: getattr(model, name) for name in _REPLACED}
        for name in _REPLACED:
            vars(model)[name] = getattr(self, name.lstrip("_"))
        model._distribute_strategy = self
        self._prepare()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Replaces model.compile."""
        self._plain["compile"](*args, **kwargs)
        self._prepare()

    def _prepare(self) -> None:
        self._ranks.wrap(find_optimizers(self._model))
        self._model.jit_compile = False  # XLA has no kernels for Horovod's operations
        self._model.train_function = self._model.test_function = self._model.predict_function = None

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Replaces model.fit."""
        call = Call(self._plain["fit"], args, kwargs)
        chosen = callbacks.of_rank(call.get("callbacks"), self._topology.rank)
        call.set("callbacks", [*chosen, callbacks.Together(self, chosen)])
        if self._topology.rank:
            call.set("verbose", 0)
        self._is_fitting, self._own, self._facts = True, [], facts(call)
        try:
            with checks.refusals(self._topology):
                return call()
        finally:
            self._is_fitting = False

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Replaces model.evaluate; within a callback, the rank evaluates all data on its own."""
        if self._is_fitting and not kwargs.get("_use_cached_eval_dataset"):
            return self._on_one_rank("evaluate", *args, **kwargs)
        self._is_testing = True
        try:
            return self._on_all_ranks("evaluate", *args, **kwargs)
        finally:
            self._is_testing = False

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Replaces model.predict, with all rows in order on every rank; within a callback, the rank is on its own."""
        run = self._on_one_rank if self._is_fitting else self._on_all_ranks
        return run("predict", *args, **kwargs)

    def predict_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Replaces model.predict_on_batch: each rank computes all rows."""
        return self._on_one_rank("predict_on_batch", *args, **kwargs)

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Replaces model.train_on_batch, which is refused."""
        self._refuse("train_on_batch", "use fit, or data_parallel(step) for a loop of your own")

    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Replaces model.test_on_batch, which is refused."""
        self._refuse("test_on_batch", "use evaluate")

    def _refuse(self, name: str, remedy: str) -> None:
        with checks.refusals(self._topology):
            raise ConfigError([f"{name}: its results are not summed over the ranks; {remedy}"])

    def _on_all_ranks(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if self._topology.rank:
            kwargs["verbose"] = 0
        if not self._is_fitting:
            self._own = []
            if self._model.built:
                self._broadcast()
            checks.begin_epoch()
        with checks.refusals(self._topology):
            return self._plain[name](*args, **kwargs)

    def _on_one_rank(self, name: str, *args: Any, **kwargs: Any) -> Any:
        model, of_all = self._model, {name: getattr(self._model, name) for name in self._functions}
        vars(model).update(self._functions)
        self._is_alone = True
        try:
            return self._plain[name](*args, **kwargs)
        finally:
            self._is_alone = False
            self._functions = {name: getattr(model, name) for name in of_all}
            vars(model).update(of_all)

    def scope(self) -> AbstractContextManager[None]:
        """Part of the interface that Keras expects; nothing."""
        return nullcontext()

    def experimental_distribute_dataset(self, dataset: Any) -> Any:
        """Part of the interface that Keras expects: each rank reads all batches, and run() takes its rows."""
        if self._is_alone:
            return dataset
        policy = dataset.options().experimental_distribute.auto_shard_policy
        self._own.append(policy == tf.data.experimental.AutoShardPolicy.OFF)
        if len(set(self._own)) > 1:
            raise ConfigError(["own_batches: training and validation data must both be marked, or neither"])
        self._ranks.takes_own_batches = self._own[-1]
        return dataset

    def run(self, step: Callable[[Any], Any], args: Any = (), kwargs: Any = None) -> Any:
        """Runs a step of the model; Keras calls it."""
        (data,) = args
        if self._is_alone:
            return step(data)
        if step not in (self._model.train_step, self._model.test_step):
            return self._ranks.predict(step, data)

        def recorded(rows: Any) -> Any:
            if has_own_code:
                checks.suspect(probe.is_of_whole_batch(step, rows, self._variables, self._model), checks.NO_MEANS)
            with self._results.recording() as origins:
                outputs = step(rows)
                checks.check_assigned(self._variables(), "give it to a metric or a layer of the model")
                return self._results.of_step(outputs, origins)

        has_own_code = step == self._model.train_step and probe.has_own_code(self._model)
        return self._ranks.train(recorded, data, self._state)

    def _variables(self) -> list[keras.Variable]:
        states = [variable for each in find_optimizers(self._model) for variable in each.variables]
        return [*self._model.variables, *states, *self._results.variables(), noise.state()]

    def _state(self) -> list[keras.Variable]:
        return [*self._results.variables(), *statistics.of_ranks(self._model)]

    def maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """Replaces a method of Keras: builds the model by the shapes of a batch, before its first step."""
        model = self._model
        if iterator is None or self._is_alone:
            return
        unbuilt = {layer.name for layer in model._flatten_layers() if not layer.built}
        try:
            spec = iterator._distributed_dataset.element_spec
            model._symbolic_build(data_batch=keras.tree.map_structure(_symbol, spec))
        except Exception as error:
            if unbuilt - {model.name}:  # a model with a train_step of its own need not be callable
                raise ConfigError(
                    [f"{model.name}: its weights cannot be made before training; call it on a batch first: {error}"]
                ) from error
        statistics.use_global_batch(model)

    def get_metrics_result_or_logs(self, logs: Any) -> Any:
        """Replaces a method of Keras, which it calls at the end of an epoch and of an evaluation."""
        plain = self._plain["_get_metrics_result_or_logs"]
        if self._is_alone:
            return plain(logs)
        self._results.check()
        self._results.sum_metrics()
        if not self._is_testing:
            statistics.synchronise(self._model, self._topology)
        results = plain(logs)
        return self._results.of_epoch(logs) if results is logs else results

    def begin_training(self, num_steps: int | None) -> None:
        """Compares the ranks, and gives all rank 0's weights, optimizer states and first epoch."""
        runtime.check_alike({**self._facts, **self._model_facts(), "steps of an epoch": num_steps})
        regularised = [layer.name for layer in self._model._flatten_layers() if layer.activity_regularizer is not None]
        if regularised and _adds_up_activities():
            raise ConfigError(
                [f"{regularised[0]}: activity_regularizer is a sum over the batch here; use Keras 3.13 or later"]
            )
        if self._ranks.takes_own_batches and num_steps is None:
            raise ConfigError(["own_batches: Keras cannot tell the number of steps of an epoch; pass steps_per_epoch"])
        self._broadcast()
        self._model._initial_epoch = runtime.broadcast_object(self._model._initial_epoch)

    def begin_epoch(self) -> None:
        """The next step is the first one of an epoch."""
        checks.begin_epoch()

    def end_batch(self) -> None:
        """In an elastic job, the script starts again when ranks are to join or leave."""
        _restart().between_batches()

    def end_training(self) -> None:
        """Compares the weights of all ranks."""
        runtime.assert_weights_in_sync(self._model)

    def _broadcast(self) -> None:
        optimizers = find_optimizers(self._model)
        of_optimizers = [variable for optimizer in optimizers if optimizer.built for variable in optimizer.variables]
        runtime.broadcast_variables([*self._model.variables, *of_optimizers])

    def _model_facts(self) -> dict[str, Any]:
        weights = [
            [variable.name, list(variable.shape), str(variable.dtype), bool(variable.trainable)]
            for variable in self._model.weights
        ]
        optimizers = [
            [type(optimizer).__name__, {name: str(value) for name, value in optimizer.get_config().items()}]
            for optimizer in find_optimizers(self._model)
        ]
        return {"weights of the model": weights, "optimizers": optimizers}


_REPLACED = (
    "compile",
    "fit",
    "evaluate",
    "predict",
    "predict_on_batch",
    "train_on_batch",
    "test_on_batch",
    "_maybe_symbolic_build",
    "_get_metrics_result_or_logs",
)


@functools.cache
def _adds_up_activities() -> bool:
    """Whether Keras adds the activities of a batch up, as before 3.13, instead of taking the mean over its rows."""
    layer = keras.layers.Activation("linear", activity_regularizer=keras.regularizers.L1(1.0), name="probe")
    layer(keras.ops.ones((2, 1)))
    return float(layer.losses[0]) == 2.0


def _symbol(spec: Any) -> Any:
    """A symbolic tensor with the shape and dtype of a dataset's tensor; None if there is none."""
    shape = getattr(spec, "shape", None)
    return None if shape is None else KerasTensor(tuple(shape), keras.backend.standardize_dtype(spec.dtype))

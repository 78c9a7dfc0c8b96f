"""Next-token prediction with a decoder-only transformer, in Keras 3 on TensorFlow.

    horovodrun -np 2 python -m recipes.transformer_lm_tf
    horovodrun -np 2 python -m recipes.transformer_lm_tf model=lm_mini data.tokenizer=bpe model.dropout=0.1
    horovodrun -np 4 python -m recipes.transformer_lm_tf data.path=README.md parallel.num_micro_batches=2

Perplexity per byte on the held-out tenth of Python's language reference: README.md. `python -m recipes generate`
continues a text. recipes/transformer_lm_torch.py is the same recipe in PyTorch, with the same functions and the same
conf/transformer_lm.yaml.
"""

import math
from collections.abc import Callable
from typing import Any

from common.config.schema import LMConfig, TransformerLMConfig
from common.config.validation import validate
from common.data import datasets, sampler
from common.data.datasets.text import Windows
from common.data.sampler import TrainingSampler
from common.distributed.topology import Topology
from common.gradients.step_metrics import StepMetrics
from common.tf.distributed import runtime
from common.tf.distributed.runtime import Optimizer
from common.tf.gradients import optimizers
from common.tf.gradients.autotune import choose_compression
from common.tf.gradients.gradients import Gradients
from common.tf.models import mixed_precision, transformer
from common.tf.parallel.parameter_server import build_gradients
from common.tf.parallel.pipeline import compiled, forward, forward_backward
from common.tf.parallel.sharded import build_optimizer
from common.tf.parallel.stage import Stage, build_stage
from common.tf.training.checkpoint import State
from common.training import command_line, preemption, provenance
from common.training.checkpoint import Checkpoints
from common.training.lr_schedule import learning_rate
from common.training.run_log import RunLog, new_folder

import keras
import tensorflow as tf

RECIPE = "transformer_lm_tf"
EVALUATION_BATCH = 64


def build_layers(cfg: LMConfig, vocabulary_size: int) -> list[keras.Layer]:
    """Layers in order: tokens (B, T) int64 -> logits (B, T, vocabulary_size) of the token that follows each."""
    embedding = transformer.Embedding(vocabulary_size, cfg.context, cfg.width, cfg.dropout)
    blocks = [transformer.Block(cfg.width, cfg.num_heads, cfg.dropout, cfg.num_layers) for _ in range(cfg.num_layers)]
    return [embedding, *blocks, transformer.Head(cfg.width, vocabulary_size, embedding if cfg.tied else None)]


def loss_sum(logits: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """The cross-entropy () of logits (B, T, V) and targets (B, T): a mean over tokens, summed over examples."""
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
    return tf.reduce_sum(losses) / targets.shape[1]


def make_train_step(
    model: Stage,
    optimizer: Optimizer,
    gradients: Gradients,
    cfg: TransformerLMConfig,
) -> Callable[..., StepMetrics]:
    """Returns the step, compiled where possible: (inputs, targets, global_size, stop) -> StepMetrics."""

    @gradients.compiled
    def update(grads: list[tf.Tensor], loss: tf.Tensor, stop: tf.Tensor, share: tf.Tensor) -> StepMetrics:
        """The part of a step after backward: exchanges and clips the gradients, and updates the weights."""
        sums, grads = gradients.exchange(grads, loss, stop, share)
        grads = gradients.clip_global_norm(grads, cfg.train.clip_norm)
        optimizers.apply(optimizer, grads, model, sums)
        return sums

    def train_step(inputs: tf.Tensor, targets: tf.Tensor, global_size: tf.Tensor, stop: tf.Tensor) -> StepMetrics:
        """One optimizer step; returns its metrics, such as the mean loss over the global batch."""
        loss, grads = forward_backward(model, loss_sum, inputs, targets, global_size, gradients.loss_scale)
        return update(grads, loss, stop, tf.shape(inputs)[0] / global_size)

    signature = [
        tf.TensorSpec((None, cfg.model.context), tf.int64),
        tf.TensorSpec((None, cfg.model.context), tf.int64),
        tf.TensorSpec((), tf.int32),
        tf.TensorSpec((), tf.bool),
    ]
    return compiled(model, train_step, signature)


def evaluate(model: Stage, windows: Windows, topology: Topology, cfg: TransformerLMConfig) -> dict[str, float]:
    """Loss and perplexity per token, and bits per byte; each example is counted once, on one rank."""
    loss = count = 0.0
    for part in sampler.evaluation_batches(len(windows), EVALUATION_BATCH, topology):
        inputs, targets = runtime.to_tensors(windows.get_batch(part), cfg.precision)
        logits, targets = forward(model, inputs, targets)
        loss += float(loss_sum(logits, targets))
        count += len(targets)
    loss, count = runtime.sum_over_ranks(loss, count)
    bits_per_byte = loss / count / math.log(2) * len(windows.tokens) / windows.num_bytes
    return {
        "test_loss": loss / count,
        "test_perplexity": math.exp(loss / count),
        "test_bits_per_byte": bits_per_byte,
    }


def train(cfg: TransformerLMConfig) -> dict[str, Any]:
    """Runs the whole training; returns the contents of summary.json."""
    topology = runtime.init()
    with runtime.raise_on_all_ranks():
        topology = validate(cfg, topology)
        datasets.prepare(cfg.data, topology)
    with runtime.raise_on_all_ranks():
        corpus = datasets.load_text(cfg.data, cfg.model.context)
    runtime.check_alike(provenance.facts(cfg, corpus.train.fingerprint))
    cfg.run.dir = runtime.broadcast_object(new_folder(cfg, RECIPE))

    runtime.seed(cfg.seed, topology)
    mixed_precision.set_policy(cfg.precision)
    layers = build_layers(cfg.model, corpus.tokenizer.vocabulary_size)
    model = build_stage(layers, cfg, topology, corpus.train)
    optimizer = build_optimizer(cfg, model)
    cfg.compression = choose_compression(cfg, model, corpus.train, topology)
    gradients = build_gradients(cfg, model, optimizer)
    extras = {"tokenizer": corpus.tokenizer.to_json()}
    state = State(model, optimizer, gradients)
    checkpoints = Checkpoints(cfg, RECIPE, corpus.train.fingerprint, state, runtime, topology, extras)
    plan = TrainingSampler.from_config(cfg, len(corpus.train), topology, checkpoints.restore())
    train_step = make_train_step(model, optimizer, gradients, cfg)

    run = RunLog(cfg, RECIPE, plan, runtime)
    for step, batch in run.steps(corpus.train):
        lr = learning_rate(step, cfg)
        optimizers.set_learning_rate(optimizer, lr)
        runtime.seed_dropout(model, cfg.seed, topology, step.number)
        inputs, targets = runtime.to_tensors(batch, cfg.precision)
        sums = train_step(inputs, targets, step.global_size, preemption.requested())
        run.record(step, lr, sums)
        if step.ends_epoch:
            gradients.sync_weights()
            run.log(step, **evaluate(model, corpus.test, topology, cfg))
        checkpoints.save_if_due(step, sums, plan)
    return run.finish(gradients.buckets, runtime.assert_weights_in_sync(model, topology.groups), model.bubble_report())


def main() -> None:
    """Command line entry: conf/transformer_lm.yaml plus key=value overrides."""
    command_line.run(train, "transformer_lm", runtime)


if __name__ == "__main__":
    main()

"""Next-token prediction with a decoder-only transformer, in Keras 3 on TensorFlow.

    horovodrun -np 2 python -m recipes.transformer_lm_tf
    horovodrun -np 2 python -m recipes.transformer_lm_tf model=lm_mini data.tokenizer=bpe model.dropout=0.1
    horovodrun -np 4 python -m recipes.transformer_lm_tf data.path=README.md parallel.num_micro_batches=2

Perplexity per byte on the held-out tenth of Python's language reference: README.md. `python -m recipes generate`
continues a text. recipes/transformer_lm_torch.py is the same recipe in PyTorch, with the same functions and the same
conf/transformer_lm.yaml.
"""

import math
from typing import Any

from common.config.schema import LMConfig, TransformerLMConfig
from common.data import datasets
from common.gradients.step_metrics import StepMetrics
from common.tf.engine import Batch, Engine
from common.tf.job import Job
from common.tf.models import transformer
from common.training import command_line
from common.training.lr_schedule import learning_rate

import keras
import tensorflow as tf


def build_layers(cfg: LMConfig, vocabulary_size: int) -> list[keras.Layer]:
    """Layers in order: tokens (B, T) int64 -> logits (B, T, vocabulary_size) of the token that follows each."""
    embedding = transformer.Embedding(vocabulary_size, cfg.context, cfg.width, cfg.dropout)
    blocks = [transformer.Block(cfg.width, cfg.num_heads, cfg.dropout, cfg.num_layers) for _ in range(cfg.num_layers)]
    return [embedding, *blocks, transformer.Head(cfg.width, vocabulary_size, embedding if cfg.tied else None)]


def loss_sum(logits: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """The cross-entropy () of logits (B, T, V) and targets (B, T): a mean over tokens, summed over examples."""
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
    return tf.reduce_sum(losses) / targets.shape[1]


def train_step(engine: Engine, batch: Batch, cfg: TransformerLMConfig) -> StepMetrics:
    """One optimizer step, the same on every rank; returns its metrics, such as the mean loss over the global batch."""
    engine.gradients.zero()
    # Each rank divides its sum by the size of the GLOBAL batch, so that the sum over the ranks is the exact mean.
    engine.forward_backward(loss_sum, batch.inputs, batch.targets, batch.global_size)
    metrics = engine.gradients.synchronize()  # the allreduces, each as soon as backward has finished its gradients
    engine.gradients.clip_norm(cfg.train.clip_norm)
    engine.step(metrics)
    return metrics


def evaluate(engine: Engine, windows: datasets.Windows) -> dict[str, float]:
    """Loss and perplexity per token, and bits per byte; each example is counted once, on one rank."""
    (loss,) = engine.allreduce_mean(windows, loss_sum, batch_size=64)
    tokens_per_byte = len(windows.tokens) / windows.num_bytes
    return {
        "test_loss": loss,
        "test_perplexity": math.exp(loss),
        "test_bits_per_byte": loss / math.log(2) * tokens_per_byte,
    }


def train(cfg: TransformerLMConfig) -> dict[str, Any]:
    """Runs the whole training; returns the contents of summary.json."""
    job = Job(cfg, __file__)  # starts Horovod; a bad configuration is refused by all ranks together
    corpus = job.load(datasets.load_text, cfg.data, cfg.model.context)
    layers = build_layers(cfg.model, corpus.tokenizer.vocabulary_size)
    engine = job.parallelize(layers, corpus.train)  # the whole model, a stage of it, or a server
    extras = {"tokenizer": corpus.tokenizer.to_json()}
    run = job.restore_or_broadcast(engine, corpus.train, extras)  # a checkpoint, or rank 0's weights to all ranks
    step_in_graph = engine.compile(lambda batch: train_step(engine, batch, cfg))

    for step, batch in run.batches():  # this rank's part of each global batch
        engine.set_learning_rate(learning_rate(step, cfg))
        metrics = step_in_graph(batch)
        run.record(step, metrics)
        if step.ends_epoch:
            run.log(step, **evaluate(engine, corpus.test))
        run.save_if_due(step, metrics)  # also if a rank got SIGTERM
    return run.finish(engine.assert_weights_in_sync())


def main() -> None:
    """Command line entry: conf/transformer_lm.yaml plus key=value overrides."""
    command_line.run(train)


if __name__ == "__main__":
    main()

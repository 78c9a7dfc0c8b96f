"""Next-token prediction with a decoder-only transformer, in PyTorch.

    horovodrun -np 2 python -m recipes.transformer_lm_torch
    horovodrun -np 2 python -m recipes.transformer_lm_torch model=lm_mini data.tokenizer=bpe model.dropout=0.1
    horovodrun -np 4 python -m recipes.transformer_lm_torch data.path=README.md parallel.num_micro_batches=2

Perplexity per byte on the held-out tenth of Python's language reference: README.md. `python -m recipes generate`
continues a text. recipes/transformer_lm_tf.py is the same recipe in Keras 3, with the same functions and the same
conf/transformer_lm.yaml.
"""

import math
from typing import Any

from common.config.schema import LMConfig, TransformerLMConfig
from common.config.validation import validate
from common.data import datasets, sampler
from common.data.datasets.text import Windows
from common.data.sampler import TrainingSampler
from common.distributed.topology import Topology
from common.gradients.step_metrics import StepMetrics
from common.torch.distributed import runtime
from common.torch.distributed.runtime import Optimizer
from common.torch.gradients import optimizers
from common.torch.gradients.autotune import choose_compression
from common.torch.gradients.gradients import Gradients
from common.torch.models import transformer
from common.torch.parallel.parameter_server import build_gradients
from common.torch.parallel.pipeline import forward, forward_backward
from common.torch.parallel.sharded import build_optimizer
from common.torch.parallel.stage import Stage, build_stage
from common.torch.training.checkpoint import State
from common.training import command_line, provenance
from common.training.checkpoint import Checkpoints
from common.training.lr_schedule import learning_rate
from common.training.run_log import RunLog, new_folder

from torch import Tensor, nn
from torch.nn import functional as F

RECIPE = "transformer_lm_torch"
EVALUATION_BATCH = 64


def build_layers(cfg: LMConfig, vocabulary_size: int) -> list[nn.Module]:
    """Layers in order: tokens (B, T) int64 -> logits (B, T, vocabulary_size) of the token that follows each."""
    embedding = transformer.Embedding(vocabulary_size, cfg.context, cfg.width, cfg.dropout)
    blocks = [transformer.Block(cfg.width, cfg.num_heads, cfg.dropout, cfg.num_layers) for _ in range(cfg.num_layers)]
    return [embedding, *blocks, transformer.Head(cfg.width, vocabulary_size, embedding if cfg.tied else None)]


def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy () of logits (B, T, V) and targets (B, T): a mean over tokens, summed over examples."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / targets.shape[1]


def train_step(
    model: Stage,
    optimizer: Optimizer,
    gradients: Gradients,
    inputs: Tensor,
    targets: Tensor,
    global_size: int,
    cfg: TransformerLMConfig,
) -> StepMetrics:
    """One optimizer step; returns its metrics, such as the mean loss over the global batch."""
    sums = forward_backward(model, loss_sum, inputs, targets, global_size, gradients)
    gradients.clip_global_norm(cfg.train.clip_norm)
    optimizers.step(optimizer, sums)
    return sums


def evaluate(model: Stage, windows: Windows, topology: Topology, cfg: TransformerLMConfig) -> dict[str, float]:
    """Loss and perplexity per token, and bits per byte; each example is counted once, on one rank."""
    model.eval()
    loss = count = 0.0
    for part in sampler.evaluation_batches(len(windows), EVALUATION_BATCH, topology):
        inputs, targets = runtime.to_tensors(windows.get_batch(part), cfg.precision, runtime.device(topology))
        logits, targets = forward(model, inputs, targets)
        loss += loss_sum(logits, targets).item()
        count += len(targets)
    model.train()
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
    device = runtime.device(topology)
    layers = build_layers(cfg.model, corpus.tokenizer.vocabulary_size)
    model = build_stage(layers, cfg, topology, corpus.train)
    optimizer = build_optimizer(cfg, model)
    cfg.compression = choose_compression(cfg, model, corpus.train, topology)
    gradients = build_gradients(cfg, model, optimizer)
    extras = {"tokenizer": corpus.tokenizer.to_json()}
    state = State(model, optimizer, gradients)
    checkpoints = Checkpoints(cfg, RECIPE, corpus.train.fingerprint, state, runtime, topology, extras)
    plan = TrainingSampler.from_config(cfg, len(corpus.train), topology, checkpoints.restore())

    run = RunLog(cfg, RECIPE, plan, runtime)
    for step, batch in run.steps(corpus.train):
        lr = learning_rate(step, cfg)
        optimizers.set_learning_rate(optimizer, lr)
        runtime.seed(cfg.seed, topology, step.number)
        inputs, targets = runtime.to_tensors(batch, cfg.precision, device)
        sums = train_step(model, optimizer, gradients, inputs, targets, step.global_size, cfg)
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

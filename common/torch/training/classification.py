"""Loss and evaluation of classification recipes."""

from common.config.schema import RunConfig
from common.data import sampler
from common.data.datasets.examples import Examples
from common.distributed.topology import Topology
from common.torch.distributed import runtime
from common.torch.parallel.pipeline import forward
from common.torch.parallel.stage import Stage

from torch import Tensor
from torch.nn import functional as F

EVALUATION_BATCH = 1024


def loss_sum(logits: Tensor, targets: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """The cross-entropy () of logits (B, classes) and targets (B,), summed over the examples."""
    return F.cross_entropy(logits, targets, class_weights, reduction="sum")


def evaluate(model: Stage, examples: Examples, topology: Topology, cfg: RunConfig) -> dict[str, float]:
    """Mean loss and accuracy over all examples; each example is counted once, on one rank."""
    model.eval()
    loss = correct = count = 0.0
    for part in sampler.evaluation_batches(len(examples), EVALUATION_BATCH, topology):
        inputs, targets = runtime.to_tensors(examples.get_batch(part), cfg.precision, runtime.device(topology))
        logits, targets = forward(model, inputs, targets)
        loss += loss_sum(logits, targets).item()
        correct += (logits.argmax(dim=-1) == targets).sum().item()
        count += len(targets)
    model.train()
    loss, correct, count = runtime.sum_over_ranks(loss, correct, count)
    return {"test_loss": loss / count, "test_accuracy": correct / count}

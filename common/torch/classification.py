"""Loss and evaluation of recipes that tell classes apart."""

from common import sharding
from common.config import RunConfig
from common.datasets.examples import Examples
from common.topology import Topology
from common.torch import runtime
from common.torch.pipeline import forward
from common.torch.stage import Stage

from torch import Tensor
from torch.nn import functional as F

EVALUATION_BATCH = 1024


def sum_of_losses(logits: Tensor, targets: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """() cross-entropy of logits (B, classes) and targets (B,), summed over the examples."""
    return F.cross_entropy(logits, targets, class_weights, reduction="sum")


def evaluate(model: Stage, examples: Examples, topology: Topology, cfg: RunConfig) -> dict[str, float]:
    """Loss and accuracy on all examples; each is counted once, on one rank."""
    model.eval()
    loss = correct = count = 0.0
    for part in sharding.evaluation_batches(len(examples), EVALUATION_BATCH, topology):
        inputs, targets = runtime.to_tensors(examples.take(part), cfg.precision, runtime.device(topology))
        logits, targets = forward(model, inputs, targets)
        loss += sum_of_losses(logits, targets).item()
        correct += (logits.argmax(dim=-1) == targets).sum().item()
        count += len(targets)
    model.train()
    loss, correct, count = runtime.sum_over_ranks(loss, correct, count)
    return {"test_loss": loss / count, "test_accuracy": correct / count}

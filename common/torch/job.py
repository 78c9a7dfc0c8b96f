"""A run of a recipe in PyTorch."""

from collections.abc import Sequence
from types import ModuleType

from common.data.datasets.augment import Augmented
from common.data.datasets.balance import class_weights
from common.data.datasets.examples import Examples
from common.gradients.gradient_sync import SyncOptions
from common.torch.distributed import runtime
from common.torch.engine import Engine
from common.torch.gradients.autotune import choose_compression
from common.torch.parallel.parameter_server import build_sync
from common.torch.parallel.sharded import build_optimizer
from common.torch.parallel.stage import build_stage
from common.torch.training.checkpoint import State
from common.training import job

from torch import Tensor, nn


class Job(job.Job[Engine]):
    """The Job of common/training/job.py."""

    runtime: ModuleType = runtime

    def class_weights(self, examples: Augmented) -> Tensor:
        """(10,) factors on the losses of each class (data.balance)."""
        weights = class_weights(examples.cfg, examples.classes)
        return runtime.to_tensor(weights, self.cfg.precision, runtime.device(self.topology))

    def _engine(self, layers: Sequence[nn.Module], examples: Examples) -> Engine:
        cfg, topology = self.cfg, self.topology
        stage = build_stage(layers, cfg.parallel, cfg.precision, topology, examples)
        optimizer = build_optimizer(cfg.optimizer, stage)
        cfg.compression = choose_compression(cfg, stage, examples, topology)
        gradients = build_sync(stage, optimizer, SyncOptions.from_config(cfg), cfg.parallel)
        return Engine(stage, gradients, optimizer, cfg.precision)

    def _state(self, engine: Engine) -> State:
        return State(engine.stage, engine.optimizer, engine.gradients, on_all_ranks=self.cfg.elastic)

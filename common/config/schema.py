"""The configuration's schema: one dataclass per conf group.

The dataclasses define the keys, their types and units; the YAML files in conf/ have the values. A configuration is
composed by common/config/composition.py and checked by common/config/validation.py.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING, OmegaConf


class Balance(Enum):
    """How classes with unequal numbers of examples are balanced."""

    none = 0
    resample = 1
    """An epoch draws as many examples as the set has, with replacement, each class equally often on average."""
    weight_loss = 2
    """Each example is used once; its loss is weighted by the inverse of its class's frequency."""


class Verify(Enum):
    """How shards are checked before training."""

    off = 0
    size = 1
    hash = 2


class TokenizerKind(Enum):
    """The kind of tokenizer."""

    byte = 0
    char = 1
    bpe = 2


@dataclass
class DataConfig:
    """Where the examples come from."""

    name: str = MISSING
    ledger: bool = MISSING
    """Records which rank used which example at which step; `python -m recipes check-ledger` reads it."""


@dataclass
class LinearDataConfig(DataConfig):
    """Numbers drawn from a linear model with noise."""

    num_examples: int = MISSING
    num_features: int = MISSING
    noise: float = MISSING
    """Standard deviation of the noise on each target."""


@dataclass
class ImagesConfig(DataConfig):
    """28 x 28 images of ten classes."""

    balance: Balance = MISSING
    max_shift: int = MISSING
    """Largest shift of training images in each direction, in pixels; 0: none."""
    max_rotation: float = MISSING
    """Largest rotation of training images in either direction, in degrees; 0: none."""


@dataclass
class MnistConfig(ImagesConfig):
    """MNIST in the four standard IDX files."""

    root: str | None = MISSING
    """Folder of the files; null: the user's cache, into which missing files are downloaded."""


@dataclass
class ImageShardsConfig(ImagesConfig):
    """Images that `python -m recipes shard-data` has written."""

    path: str | None = MISSING
    """Folder with an index.json; must be set."""
    verify: Verify = MISSING
    """Whether all shards are hashed before training, or only their sizes are checked, or nothing."""


@dataclass
class LanguageConfig(DataConfig):
    """Text as tokens; the last tenth of the text is held out as the test set."""


@dataclass
class TextConfig(LanguageConfig):
    """Text files, read into memory."""

    path: str | None = MISSING
    """A UTF-8 file, or a folder of them; null: Python's language reference, which comes with CPython."""
    tokenizer: TokenizerKind = MISSING
    vocabulary_size: int = MISSING
    """Number of tokens that tokenizer=bpe learns; unused by the others, which have a token per byte or character."""


@dataclass
class TextShardsConfig(LanguageConfig):
    """Tokens that `python -m recipes shard-data` has written."""

    path: str | None = MISSING
    """Folder with an index.json; must be set."""
    verify: Verify = MISSING
    """Whether all shards are hashed before training, or only their sizes are checked, or nothing."""


@dataclass
class ModelConfig:
    """The model's sizes; each task has its own."""

    name: str = MISSING


@dataclass
class MLPConfig(ModelConfig):
    """A multilayer perceptron for 28 x 28 images of ten classes."""

    hidden_sizes: list[int] = MISSING
    dropout: float = MISSING
    """Probability that a hidden unit is zeroed in training; 0: none."""


@dataclass
class LinearConfig(ModelConfig):
    """One linear layer with one output."""


@dataclass
class CNNConfig(ModelConfig):
    """A small convolutional network for 28 x 28 images of ten classes."""

    channels: list[int] = MISSING
    """Output channels of each convolution; height and width of the image are halved after each."""
    hidden_size: int = MISSING
    dropout: float = MISSING


@dataclass
class LMConfig(ModelConfig):
    """A decoder-only transformer."""

    num_layers: int = MISSING
    num_heads: int = MISSING
    width: int = MISSING
    """Values per token between the layers; must be divisible by num_heads."""
    context: int = MISSING
    """Tokens per example, and the largest number of tokens that the model attends to."""
    tied: bool = MISSING
    """Whether the output layer uses the token embedding's weights."""
    dropout: float = MISSING
    """Probability that a value of the embedding or of a layer's residual branch is zeroed in training; 0: none."""


class OnNonfinite(Enum):
    """What happens if a loss or a gradient is infinite or NaN."""

    stop = 0
    """Training ends with status 1; the newest checkpoint is the one before that step."""
    skip = 1
    """All ranks skip the update of that step; the check reads all gradients once more."""


class BatchSchedule(Enum):
    """How the global batch size grows; the learning rate grows with it (common/data/batch_schedule.py)."""

    constant = 0
    steps = 1
    """Doubles after each step of train.batch_growth_steps."""
    noise_scale = 2
    """Doubles when the gradient noise scale exceeds the batch size."""


@dataclass
class TrainConfig:
    """The length of training and the batch size."""

    epochs: int = MISSING
    max_steps: int | None = MISSING
    """Number of optimizer steps after which the run ends; null: all epochs."""
    global_batch_size: int = MISSING
    """Examples per optimizer step over all ranks; does not grow with the number of ranks."""
    clip_norm: float = MISSING
    """Largest global L2 norm of the mean gradient; 0: no clipping."""
    log_every: int = MISSING
    """Optimizer steps between two values of train_loss."""
    checkpoint_every: int = MISSING
    """Optimizer steps between two checkpoints; 0: only at the end."""
    keep_checkpoints: int = MISSING
    """Number of the newest checkpoints that are kept."""
    on_nonfinite: OnNonfinite = MISSING
    batch_schedule: BatchSchedule = MISSING
    batch_growth_steps: list[int] = MISSING
    """With batch_schedule=steps: the steps after which the global batch size doubles."""
    commit_every: int = MISSING
    """With elastic=true: optimizer steps between two commits to the ranks' memory, from which the others go on."""
    reproducible: bool = MISSING
    """Whether the bits of all weights are the same for all numbers of ranks; slower (docs/runs.md)."""
    lanes: int = MISSING
    """With reproducible: number of parts of a batch, whose gradients are added in a fixed order."""
    max_batch_size: int = MISSING
    """Limit to which the global batch size grows; 0: the number of examples."""

    @property
    def measures_noise(self) -> bool:
        """Whether the squared norms of gradients must be measured for the noise scale."""
        return self.batch_schedule is BatchSchedule.noise_scale


@dataclass
class OptimizerConfig:
    """The update rule."""

    name: str = MISSING
    lr: float = MISSING
    """Peak learning rate; see lr_schedule."""
    sharded: bool = MISSING
    """Whether each rank updates one part of the weights and keeps only the state for it (ZeRO stage 1)."""


@dataclass
class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent with momentum."""

    momentum: float = MISSING


@dataclass
class AdamWConfig(OptimizerConfig):
    """Adam with decoupled weight decay, on matrices only."""

    beta1: float = MISSING
    beta2: float = MISSING
    epsilon: float = MISSING
    weight_decay: float = MISSING
    freeze_step: int = MISSING
    """Number of updates after which the second moment is frozen; 0: never."""


@dataclass
class LRScheduleConfig:
    """The learning rate over the steps."""

    name: str = MISSING
    warmup_steps: int = MISSING
    """Number of steps of linear warm-up to optimizer.lr; 0: none."""


@dataclass
class CosineConfig(LRScheduleConfig):
    """Falls from the peak along half a cosine."""

    final_fraction: float = MISSING
    """Learning rate at the last step, as a fraction of the peak."""


class Dtype(Enum):
    """A floating-point type; torch and TensorFlow use the same names."""

    float16 = 0
    bfloat16 = 1
    float32 = 2
    float64 = 3


@dataclass
class PrecisionConfig:
    """The dtypes of training."""

    name: str = MISSING
    dtype: Dtype = MISSING
    """The dtype of the weights, their gradients and the optimizer's state."""
    compute_dtype: Dtype = MISSING
    """The dtype of matrix products and convolutions, in forward and backward."""


@dataclass
class LossScalePrecisionConfig(PrecisionConfig):
    """Half precision with a factor on the loss that keeps small gradients from underflow."""

    initial_loss_scale: float = MISSING
    growth_steps: int = MISSING
    """Number of steps without an overflow after which the loss scale doubles; an overflow halves it."""


class Scope(Enum):
    """The unit that is compressed as one vector."""

    bucket = 0
    layer = 1
    """Each weight and each bias is compressed separately."""


class ReduceOp(Enum):
    """How the gradients of the ranks are combined."""

    average = 0
    adasum = 1


@dataclass
class CompressionConfig:
    """How gradients are compressed for the exchange; `none` has this schema."""

    name: str = MISSING


@dataclass
class LossyConfig(CompressionConfig):
    """A compressor; methods are described in docs/compression.md."""

    error_feedback: bool = MISSING
    """Whether a step's compression error is added to the gradients of the next step."""
    scope: Scope = MISSING
    min_numel: int = MISSING
    """Gradients of weights with fewer values are exchanged uncompressed."""
    start_step: int = MISSING
    """The first step (from 1) whose gradients are compressed."""
    two_level: bool = MISSING
    """Whether gradients are summed uncompressed within a host, and compressed only between hosts."""
    health: bool = MISSING
    """Whether to log the residual's norm and the cosine to the true gradient; costs an uncompressed exchange."""


@dataclass
class OwnCompressionConfig(LossyConfig):
    """A user-defined compressor and its options."""

    options: dict[str, float] = MISSING


@dataclass
class QSGDConfig(LossyConfig):
    """QSGD."""

    bits: int = MISSING
    """Bits of a value in a message, 2 to 8."""


@dataclass
class TernGradConfig(LossyConfig):
    """TernGrad."""

    clip: float = MISSING
    """Values are clipped to this number of standard deviations; 0: no clipping, which is unbiased."""


class WireValues(Enum):
    """The dtype of values in messages."""

    fp32 = 4
    fp16 = 2


@dataclass
class SparseConfig(LossyConfig):
    """A compressor that sends some of the values."""

    ratio: float = MISSING
    """Fraction of the values that is sent."""
    values: WireValues = MISSING


@dataclass
class DGCConfig(SparseConfig):
    """Deep gradient compression."""

    momentum: float | None = MISSING
    """Momentum of the velocity on each rank; null: takes over the optimizer's momentum, which is then 0 there."""
    warmup_steps: int = MISSING
    """Number of steps in which the fraction of values falls from a quarter to the ratio."""


@dataclass
class PowerSGDConfig(LossyConfig):
    """PowerSGD."""

    rank: int = MISSING
    """Number of columns of the two factors that replace a matrix."""
    values: WireValues = MISSING


@dataclass
class AutoCompressionConfig(CompressionConfig):
    """Measures the network and the methods on the model's gradients, and chooses a method."""

    candidates: list[str] = MISSING
    """Methods to choose from, in order of preference; each with the defaults of its option."""
    min_gain: float = MISSING
    """Fraction of the step's time that a method must save to be preferred to an earlier one."""


@dataclass
class ParallelConfig:
    """How the work is distributed over the ranks."""

    name: str = MISSING
    num_micro_batches: int = MISSING
    """Number of micro-batches that a rank processes one after another in a step, to save memory; 1: no cut."""


class StageBalance(Enum):
    """The cost that is balanced between the stages of a pipeline."""

    parameters = 0
    flops = 1
    time = 2
    """Forward and backward of one example, measured on rank 0."""


PIPELINE_SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb_h1")


@dataclass
class PipelineConfig(ParallelConfig):
    """Pipeline parallelism: the layers are divided into stages, each of which may have several replicas."""

    pipeline_stages: int = MISSING
    replicas_per_stage: list[int] = MISSING
    """Number of ranks that share the work of each stage, such as [3,1]; []: equally many for all stages."""
    schedule: str = MISSING
    """The order of forward and backward passes, one of PIPELINE_SCHEDULES (common/parallel/pipeline_schedule.py)."""
    virtual_stages_per_rank: int = MISSING
    """Number of model chunks per stage; more than 1 requires schedule=interleaved."""
    balance: StageBalance = MISSING
    boundaries: list[int] = MISSING
    """Numbers of the layers at which a new model chunk begins; []: chosen by balance."""


ParameterServerMode = Enum("ParameterServerMode", ("sync", "async"))
"""Whether a parameter server waits for the gradients of all workers before it updates the weights."""


@dataclass
class ParameterServerConfig(ParallelConfig):
    """The first ranks are servers, each of which updates a shard of the weights; the others are workers."""

    num_servers: int = MISSING
    mode: ParameterServerMode = MISSING
    max_staleness: int = MISSING
    """With mode=async: number of steps that a worker may be ahead of the slowest one; 0: as in sync."""


@dataclass
class ResumeConfig:
    """Whether training resumes from a checkpoint."""

    source: str = MISSING
    """auto: from the newest sound checkpoint in run.dir, if there is one; never; or the path of a checkpoint or run."""
    allow_changes: list[str] = MISSING
    """Keys that may differ from the checkpoint's configuration even though they change the loss curve."""


@dataclass
class RunFolderConfig:
    """Where the run writes."""

    dir: str | None = MISSING
    """Folder for all files of the run; null: outputs/<recipe>/<date-time>."""


@dataclass
class RunConfig:
    """The whole configuration of a recipe."""

    seed: int = MISSING
    chaos: str = MISSING
    """Failures that are made on purpose, such as kill:rank=1,step=120; empty: none (docs/runs.md)."""
    elastic: bool = MISSING
    """Whether ranks may leave and join (horovodrun --min-np)."""
    resume: ResumeConfig = MISSING
    run: RunFolderConfig = MISSING
    data: DataConfig = MISSING
    model: ModelConfig = MISSING
    train: TrainConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    lr_schedule: LRScheduleConfig = MISSING
    precision: PrecisionConfig = MISSING
    compression: CompressionConfig = MISSING
    op: ReduceOp = MISSING
    parallel: ParallelConfig = MISSING


@dataclass
class MnistMLPConfig(RunConfig):
    """The configuration of mnist_mlp_torch and mnist_mlp_tf."""

    data: ImagesConfig = MISSING
    model: MLPConfig = MISSING


@dataclass
class MnistCNNConfig(RunConfig):
    """The configuration of mnist_cnn_torch and mnist_cnn_tf."""

    data: ImagesConfig = MISSING
    model: CNNConfig = MISSING


@dataclass
class TransformerLMConfig(RunConfig):
    """The configuration of transformer_lm_torch and transformer_lm_tf."""

    data: LanguageConfig = MISSING
    model: LMConfig = MISSING


@dataclass
class LinearRegressionConfig(RunConfig):
    """The configuration of linear_regression_torch and linear_regression_tf."""

    data: LinearDataConfig = MISSING
    model: LinearConfig = MISSING


def to_yaml(cfg: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def to_dict(cfg: RunConfig) -> dict[str, Any]:
    """The resolved configuration as nested dicts of JSON values."""
    return asdict(
        cfg,
        dict_factory=lambda items: {name: value.name if isinstance(value, Enum) else value for name, value in items},
    )


def leaves(container: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted names and values of all leaves of a nested dict."""
    for name, value in container.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value

"""The configuration's schema: one dataclass per conf group.

The dataclasses say what keys there are, of which types and units; the YAML files in conf/ have the values.
A configuration is put together by common/composition.py and checked by common/validation.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING, OmegaConf


class ConfigError(Exception):
    """The user's configuration cannot be run.

    Attributes:
        problems: one message each: key=value, the rule, the remedy.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class Balance(Enum):
    """What is done about classes of unlike numbers of examples."""

    none = 0
    resample = 1
    """An epoch draws as many examples as there are, with replacement, each class equally often on average."""
    weight_loss = 2
    """Each example once; its loss is weighted by the inverse of its class's share."""


class Verify(Enum):
    """How shards are checked before training."""

    off = 0
    size = 1
    hash = 2


class TokenizerKind(Enum):
    """What a token is."""

    byte = 0
    char = 1
    bpe = 2


@dataclass
class DataConfig:
    """Where the examples come from."""

    name: str = MISSING
    ledger: bool = MISSING
    """Writes down which rank used which example at which step; `python -m recipes check-ledger` reads it."""


@dataclass
class LinearDataConfig(DataConfig):
    """Numbers drawn from a linear model with noise."""

    num_examples: int = MISSING
    num_features: int = MISSING
    noise: float = MISSING
    """Standard deviation of what is added to each target."""


@dataclass
class ImagesConfig(DataConfig):
    """28 x 28 images of ten classes."""

    balance: Balance = MISSING
    max_shift: int = MISSING
    """Training images move by up to so many pixels up, down, left and right; 0: not at all."""
    max_rotation: float = MISSING
    """Training images turn by up to so many degrees either way; 0: not at all."""


@dataclass
class MnistConfig(ImagesConfig):
    """MNIST in the four standard IDX files."""

    root: str | None = MISSING
    """Folder of the files; null: the user's cache, fetched when they are not there."""


@dataclass
class ImageShardsConfig(ImagesConfig):
    """Images that `python -m recipes shard-data` has written."""

    path: str | None = MISSING
    """Folder with an index.json; must be set."""
    verify: Verify = MISSING
    """Whether all shards are read and hashed before training, or only their sizes looked at, or nothing."""


@dataclass
class LanguageConfig(DataConfig):
    """Text as tokens, the last tenth of which is held out for the test."""


@dataclass
class TextConfig(LanguageConfig):
    """Text files, read into memory."""

    path: str | None = MISSING
    """A UTF-8 file, or a folder of them; null: Python's language reference, which CPython carries."""
    tokenizer: TokenizerKind = MISSING
    vocabulary_size: int = MISSING
    """Tokens that tokenizer=bpe learns; the others have as many as there are bytes or characters."""


@dataclass
class TextShardsConfig(LanguageConfig):
    """Tokens that `python -m recipes shard-data` has written."""

    path: str | None = MISSING
    """Folder with an index.json; must be set."""
    verify: Verify = MISSING
    """Whether all shards are read and hashed before training, or only their sizes looked at, or nothing."""


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
    """Of each convolution; the image is halved after each."""
    hidden_size: int = MISSING
    dropout: float = MISSING


@dataclass
class LMConfig(ModelConfig):
    """A decoder-only transformer."""

    num_layers: int = MISSING
    num_heads: int = MISSING
    width: int = MISSING
    """Values per token between the layers; num_heads divides it."""
    context: int = MISSING
    """Tokens that an example has and that the model looks back on."""
    tied: bool = MISSING
    """Whether the output layer uses the token embedding's weights."""
    dropout: float = MISSING
    """Probability that a value is zeroed in training, of the embedding and of what each layer adds; 0: none."""


class OnNonfinite(Enum):
    """What is done when a loss or a gradient is infinite or not a number."""

    stop = 0
    """Training ends with status 1; the last checkpoint is the one before."""
    skip = 1
    """The weights stay as they are in that step, on all ranks; looking for it reads all gradients once more."""


class BatchSchedule(Enum):
    """How the global batch grows; the learning rate grows with it (common/batch_size.py)."""

    constant = 0
    steps = 1
    """It doubles after each step of train.batch_growth_steps."""
    noise_scale = 2
    """It doubles when the gradient noise scale has passed it."""


@dataclass
class TrainConfig:
    """How long and on how much at a time."""

    epochs: int = MISSING
    max_steps: int | None = MISSING
    """Ends the run after so many optimizer steps; null: all epochs."""
    global_batch_size: int = MISSING
    """Examples per optimizer step over all ranks; does not grow with their number."""
    clip_norm: float = MISSING
    """Largest global L2 norm of the mean gradient; 0: no clipping."""
    log_every: int = MISSING
    """Optimizer steps between two values of train_loss."""
    checkpoint_every: int = MISSING
    """Optimizer steps between two checkpoints; 0: only at the end."""
    keep_checkpoints: int = MISSING
    """The newest so many are kept."""
    on_nonfinite: OnNonfinite = MISSING
    batch_schedule: BatchSchedule = MISSING
    batch_growth_steps: list[int] = MISSING
    """With batch_schedule=steps: the steps after which the global batch doubles."""
    max_batch_size: int = MISSING
    """The global batch grows no further; 0: up to the number of examples."""

    @property
    def measures_noise(self) -> bool:
        """Whether the gradients' squared norms are needed."""
        return self.batch_schedule is BatchSchedule.noise_scale


@dataclass
class OptimizerConfig:
    """The update rule."""

    name: str = MISSING
    lr: float = MISSING
    """Peak learning rate; lr_schedule says how it is reached and left."""
    sharded: bool = MISSING
    """Whether each rank keeps the state of, and updates, its part of the weights alone (ZeRO stage 1)."""


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
    """Updates after which the second moment stays as it is; 0: never."""


@dataclass
class LRScheduleConfig:
    """The learning rate over the steps."""

    name: str = MISSING
    warmup_steps: int = MISSING
    """Steps of linear growth up to optimizer.lr; 0: none."""


@dataclass
class CosineConfig(LRScheduleConfig):
    """Half a cosine from the peak down."""

    final_fraction: float = MISSING
    """Of the peak, at the last step."""


class Dtype(Enum):
    """A floating-point type; its name is that of torch and TensorFlow alike."""

    float16 = 0
    bfloat16 = 1
    float32 = 2
    float64 = 3


@dataclass
class PrecisionConfig:
    """What is computed in which dtype."""

    name: str = MISSING
    dtype: Dtype = MISSING
    """Of the weights, their gradients and the optimizer's state."""
    compute_dtype: Dtype = MISSING
    """Of products of matrices and of convolutions, forward and backward."""


@dataclass
class LossScalePrecisionConfig(PrecisionConfig):
    """Half precision, whose small gradients are kept from vanishing by a factor on the loss."""

    initial_loss_scale: float = MISSING
    growth_steps: int = MISSING
    """The loss scale doubles after so many steps without an overflow; an overflow halves it."""


class Scope(Enum):
    """What is compressed as one vector."""

    bucket = 0
    layer = 1
    """Each weight and each bias alone."""


class ReduceOp(Enum):
    """How the ranks' gradients become one."""

    average = 0
    adasum = 1


@dataclass
class CompressionConfig:
    """What is done to gradients before they travel; `none` has this schema."""

    name: str = MISSING


@dataclass
class LossyConfig(CompressionConfig):
    """A compressor; methods are described in docs/compression.md."""

    error_feedback: bool = MISSING
    """Whether what was lost in a step is added to the gradients of the next."""
    scope: Scope = MISSING
    min_numel: int = MISSING
    """Weights of fewer values travel uncompressed."""
    start_step: int = MISSING
    """The first step (from 1) whose gradients are compressed."""
    two_level: bool = MISSING
    """Whether ranks of one host are summed uncompressed, and only hosts exchange compressed sums."""
    health: bool = MISSING
    """Whether the residual's norm and the cosine to the true gradient are logged; costs an uncompressed exchange."""


@dataclass
class OwnCompressionConfig(LossyConfig):
    """A compressor of one's own, and what it needs."""

    options: dict[str, float] = MISSING


@dataclass
class QSGDConfig(LossyConfig):
    """QSGD."""

    bits: int = MISSING
    """Of a value on the wire, 2 to 8."""


@dataclass
class TernGradConfig(LossyConfig):
    """TernGrad."""

    clip: float = MISSING
    """Standard deviations beyond which values are cut off; 0: none, and unbiased."""


class WireValues(Enum):
    """The dtype of values on the wire."""

    fp32 = 4
    fp16 = 2


@dataclass
class SparseConfig(LossyConfig):
    """Some of the values."""

    ratio: float = MISSING
    """Share of the values that is sent."""
    values: WireValues = MISSING


@dataclass
class DGCConfig(SparseConfig):
    """Deep gradient compression."""

    momentum: float | None = MISSING
    """Of each rank's own velocity; null: the optimizer's, which then has none itself."""
    warmup_steps: int = MISSING
    """Steps in which the share of values falls from a quarter to the ratio."""


@dataclass
class PowerSGDConfig(LossyConfig):
    """PowerSGD."""

    rank: int = MISSING
    """Columns of the two factors that stand for a matrix."""
    values: WireValues = MISSING


@dataclass
class AutoCompressionConfig(CompressionConfig):
    """Measures the network and the methods on the model's gradients, and chooses one."""

    candidates: list[str] = MISSING
    """Methods to choose from, in the order of preference; each with the defaults of its option."""
    min_gain: float = MISSING
    """Share of the step's time that a method must save to be taken instead of one before it."""


@dataclass
class ParallelConfig:
    """How the work is spread over the ranks."""

    name: str = MISSING
    num_micro_batches: int = MISSING
    """Parts that a rank cuts its examples of one step into, one after another, to save memory; 1: none."""


class StageBalance(Enum):
    """What the stages of a pipeline are to have equally much of."""

    parameters = 0
    flops = 1
    time = 2
    """Forward and backward of one example, measured on rank 0."""


@dataclass
class PipelineConfig(ParallelConfig):
    """The layers are spread over stages, through which micro-batches pass; stages may have several replicas."""

    pipeline_stages: int = MISSING
    replicas_per_stage: list[int] = MISSING
    """Ranks that work side by side on each stage, such as [3,1]; []: equally many on all."""
    schedule: str = MISSING
    """gpipe, 1f1b, interleaved or zb_h1: the order of forward and backward passes (common/pipeline_schedule.py)."""
    parts_per_stage: int = MISSING
    """Parts of the model that each stage has; more than 1 goes with schedule=interleaved."""
    balance: StageBalance = MISSING
    boundaries: list[int] = MISSING
    """Numbers of the layers at which a new part begins; []: as balance has it."""


Mode = Enum("Mode", ("sync", "async"))
"""Whether a parameter server waits for the gradients of all workers before it updates the weights."""


@dataclass
class ParameterServerConfig(ParallelConfig):
    """The first ranks hold the weights in shards and update them; the others push gradients and pull weights."""

    num_servers: int = MISSING
    mode: Mode = MISSING
    max_staleness: int = MISSING
    """With mode=async: steps that a worker may be ahead of the slowest one; 0: none, as in sync."""


@dataclass
class ResumeConfig:
    """Whether training goes on from a checkpoint."""

    source: str = MISSING
    """auto: from the newest sound checkpoint in run.dir, if there is one; never; or the path of a checkpoint or run."""
    allow_changes: list[str] = MISSING
    """Keys that may differ from the checkpoint's although the loss curve changes with them."""


@dataclass
class RunFolderConfig:
    """What the run leaves behind."""

    dir: str | None = MISSING
    """Folder for everything that is written; null: outputs/<recipe>/<date-time>."""


@dataclass
class RunConfig:
    """The whole configuration of a recipe."""

    seed: int = MISSING
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
    """The resolved configuration as nested dicts of what JSON can hold."""
    content: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(cfg), enum_to_str=True)  # type: ignore[assignment]
    return content


def leaves(container: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted names and values of all leaves of a nested dict."""
    for name, value in container.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value

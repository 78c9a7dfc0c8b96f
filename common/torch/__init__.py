"""The PyTorch version of the framework-dependent parts."""

from common.distributed.extras import require

require("torch", "torch", "horovod")

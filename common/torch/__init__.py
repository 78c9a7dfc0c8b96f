"""How the rules of common/ are carried out with PyTorch."""

from common.extras import require

require("torch", "torch", "horovod")

"""How the rules of common/ are carried out with Keras 3 on TensorFlow.

To be imported before keras: the backend is chosen here.
"""

import os

from common.extras import require

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors only; TensorFlow greets every rank otherwise
require("tf", "tensorflow", "keras", "horovod")

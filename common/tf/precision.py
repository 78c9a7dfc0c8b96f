"""What is computed in which dtype."""

from collections.abc import Sequence

from common.config import PrecisionConfig

import keras


def set_policy(cfg: PrecisionConfig) -> None:
    """Gives all layers that are built from here on the dtypes of weights and of computation."""
    is_mixed = cfg.compute_dtype is not cfg.dtype
    keras.config.set_dtype_policy(f"mixed_{cfg.compute_dtype.name}" if is_mixed else cfg.dtype.name)


def build_model(inputs: keras.KerasTensor, layers: Sequence[keras.Layer], cfg: PrecisionConfig) -> keras.Model:
    """Layers, one after another; outputs have the dtype of the weights, so that losses are summed in it."""
    is_mixed = cfg.compute_dtype is not cfg.dtype
    cast = [keras.layers.Activation("linear", dtype=cfg.dtype.name)] if is_mixed else []
    return keras.Sequential([inputs, *layers, *cast])

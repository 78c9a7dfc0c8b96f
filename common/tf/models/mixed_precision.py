"""Mixed precision."""

from collections.abc import Sequence

from common.config.schema import PrecisionConfig

import keras


def set_policy(cfg: PrecisionConfig) -> None:
    """Sets the weight and compute dtypes of all layers that are created afterwards."""
    is_mixed = cfg.compute_dtype is not cfg.dtype
    keras.config.set_dtype_policy(f"mixed_{cfg.compute_dtype.name}" if is_mixed else cfg.dtype.name)


def build_model(inputs: keras.KerasTensor, layers: Sequence[keras.Layer], cfg: PrecisionConfig) -> keras.Model:
    """A sequence of layers whose outputs have the weight dtype, so that losses are summed in it."""
    is_mixed = cfg.compute_dtype is not cfg.dtype
    cast = [keras.layers.Activation("linear", dtype=cfg.dtype.name)] if is_mixed else []
    return keras.Sequential([inputs, *layers, *cast])

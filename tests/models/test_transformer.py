"""The transformer's layers in both bindings, and how tokens are drawn."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any, Protocol

from common.config.schema import LMConfig
from common.training.sampling import Window, choose
from tests.helpers.launch import FRAMEWORKS

import numpy as np
import pytest

VOCABULARY = 11
CFG = LMConfig("lm", num_layers=2, num_heads=3, width=15, context=8, tied=True, dropout=0.1)
UNTIED = replace(CFG, tied=False)
TOLERANCES = {"float32": 1e-4, "float64": 1e-10}  # relative to the largest value


class Model(Protocol):
    """A model in evaluation, by the names and layouts of checkpoints."""

    layers: list[Any]

    def load(self, weights: dict[str, np.ndarray]) -> None:
        """Takes over weights."""

    def weights(self) -> dict[str, np.ndarray]:
        """Its weights; tied ones once."""

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits (B, T, V) of tokens (B, T)."""

    def gradients(self, tokens: np.ndarray, upstream: np.ndarray) -> dict[str, np.ndarray]:
        """Those of the sum of the logits times upstream (B, T, V)."""


class TorchModel:
    """See Model."""

    def __init__(self, cfg: LMConfig, dtype: str) -> None:
        import torch
        from torch import nn

        self.layers = build_layers(importlib.import_module("common.torch.models.transformer"), cfg)
        torch.set_num_threads(1)  # more cost more than they bring at this size
        self.torch, self.model = torch, nn.Sequential(*self.layers).to(getattr(torch, dtype)).eval()

    def load(self, weights: dict[str, np.ndarray]) -> None:
        from common.torch.training import checkpoint

        checkpoint.load_weights(self.model, weights)

    def weights(self) -> dict[str, np.ndarray]:
        return {name: value.detach().numpy().copy() for name, value in self.model.named_parameters()}

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        array: np.ndarray = self.model(self.torch.from_numpy(tokens)).detach().numpy()
        return array

    def gradients(self, tokens: np.ndarray, upstream: np.ndarray) -> dict[str, np.ndarray]:
        logits = self.model(self.torch.from_numpy(tokens))
        loss = (logits * self.torch.from_numpy(upstream).to(logits.dtype)).sum()
        parameters = dict(self.model.named_parameters())
        gradients = self.torch.autograd.grad(loss, list(parameters.values()))
        return {name: gradient.numpy() for name, gradient in zip(parameters, gradients, strict=True)}


class TfModel:
    """See Model."""

    def __init__(self, cfg: LMConfig, dtype: str) -> None:
        transformer = importlib.import_module("common.tf.models.transformer")
        import keras
        import tensorflow as tf

        keras.config.set_dtype_policy(dtype)
        self.layers = build_layers(transformer, cfg)
        self.tf, self.model = tf, keras.Sequential([keras.Input((None,), dtype="int64"), *self.layers])
        keras.config.set_dtype_policy("float32")

    def load(self, weights: dict[str, np.ndarray]) -> None:
        from common.tf.training import checkpoint

        checkpoint.load_weights(self.model, weights)

    def weights(self) -> dict[str, np.ndarray]:
        return self._by_name([variable.numpy() for variable in self.model.trainable_variables])

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        array: np.ndarray = self.model(tokens, training=False).numpy()
        return array

    def gradients(self, tokens: np.ndarray, upstream: np.ndarray) -> dict[str, np.ndarray]:
        with self.tf.GradientTape() as tape:
            logits = self.model(tokens, training=False)
            loss = self.tf.reduce_sum(logits * self.tf.cast(upstream, logits.dtype))
        gradients = tape.gradient(loss, [variable.value for variable in self.model.trainable_variables])
        assert all(isinstance(gradient, self.tf.Tensor) for gradient in gradients)  # no tf.IndexedSlices
        return self._by_name([gradient.numpy() for gradient in gradients])

    def _by_name(self, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        from common.tf.training import checkpoint

        variables = zip(checkpoint.names(self.model), self.model.trainable_variables, arrays, strict=True)
        return {name: array.T if variable.path.endswith("kernel") else array for name, variable, array in variables}


MODELS: dict[str, Callable[[LMConfig, str], Model]] = {"torch": TorchModel, "tf": TfModel}


def build_layers(transformer: ModuleType, cfg: LMConfig) -> list[Any]:
    """The layers of the binding's module."""
    embedding = transformer.Embedding(VOCABULARY, cfg.context, cfg.width, cfg.dropout)
    blocks = [transformer.Block(cfg.width, cfg.num_heads, cfg.dropout, cfg.num_layers) for _ in range(cfg.num_layers)]
    return [embedding, *blocks, transformer.Head(cfg.width, VOCABULARY, embedding if cfg.tied else None)]


def build(framework: str, cfg: LMConfig, dtype: str = "float64") -> Model:
    """The model with weights that are large enough for every one to matter."""
    model = MODELS[framework](cfg, dtype)
    random = np.random.default_rng(0)
    weights = model.weights()
    model.load({name: random.normal(0, 0.5, weights[name].shape).astype(dtype) for name in sorted(weights)})
    return model


def draw_tokens(*shape: int) -> np.ndarray:
    """Random tokens."""
    return np.random.default_rng(1).integers(0, VOCABULARY, shape)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_logits_do_not_depend_on_later_tokens(framework: str) -> None:
    model = build(framework, CFG)
    tokens = draw_tokens(2, CFG.context)
    changed = tokens.copy()
    changed[:, 5] = (changed[:, 5] + 1) % VOCABULARY
    before, after = model.logits(tokens), model.logits(changed)
    assert before.shape == (2, CFG.context, VOCABULARY)
    np.testing.assert_allclose(after[:, :5], before[:, :5], rtol=1e-12, atol=1e-12)
    assert (np.abs(after[:, 5:] - before[:, 5:]).max(axis=-1) > 1e-3).all()


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("cfg", [CFG, UNTIED], ids=["tied", "untied"])
def test_the_decoder_gives_the_logits_of_the_full_forward(framework: str, cfg: LMConfig) -> None:
    model = build(framework, cfg)
    transformer = importlib.import_module(f"common.{framework}.models.transformer")
    tokens = draw_tokens(3 * cfg.context)
    decoder = transformer.Decoder(model.layers, cfg)
    window: list[int] = []
    for end, token in enumerate(tokens, start=1):
        window.append(int(token))
        if len(window) > cfg.context:
            window = window[-cfg.context // 2 :]
        if end == 3:
            logits = decoder.feed(tokens[:3])
        elif end > 3:
            logits = decoder.feed(tokens[end - 1 : end])
        if end >= 3:
            np.testing.assert_allclose(logits, model.logits(np.array([window]))[0, -1], rtol=1e-9, atol=1e-9)
    assert logits.shape == (VOCABULARY,)
    at_once = transformer.Decoder(model.layers, cfg).feed(tokens)
    np.testing.assert_allclose(at_once, logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_weights_by_name_number_and_initial_value(framework: str) -> None:
    cfg = LMConfig("lm", num_layers=2, num_heads=4, width=128, context=64, tied=True, dropout=0.0)
    weights = MODELS[framework](cfg, "float32").weights()
    untied = MODELS[framework](replace(cfg, tied=False), "float32").weights()
    assert sum(array.size for array in weights.values()) == 128 * (VOCABULARY + 64 + 2) + 2 * (12 * 128**2 + 13 * 128)
    assert list(untied) == [*weights, "3.projection.weight"]
    assert untied["3.projection.weight"].shape == (VOCABULARY, 128)
    assert [name for name in weights if name.startswith("1.")] == [
        f"1.{sublayer}.{leaf}"
        for sublayer in (
            "attention_norm",
            "attention.qkv",
            "attention.projection",
            "mlp_norm",
            "mlp.hidden",
            "mlp.projection",
        )
        for leaf in ("weight", "bias")
    ]
    for name, array in (weights | untied).items():
        if name.endswith("bias") or "norm" in name:
            assert (array == float(name.endswith("weight"))).all(), name
        else:
            deviation = (
                0.01 if name == "0.position.weight" else 0.01 if name[0] != "3" and "projection" in name else 0.02
            )
            assert array.std() == pytest.approx(deviation, rel=0.1), name


@pytest.mark.skipif(len(FRAMEWORKS) < 2, reason="needs both frameworks")
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("cfg", [CFG, UNTIED], ids=["tied", "untied"])
def test_twins_with_equal_weights_have_equal_logits_and_gradients(cfg: LMConfig, dtype: str) -> None:
    torch, tf = build("torch", cfg, dtype), build("tf", cfg, dtype)
    weights = torch.weights()
    tf.load(weights)
    assert list(tf.weights()) == list(weights)
    tokens = draw_tokens(2, cfg.context)
    upstream = np.random.default_rng(2).standard_normal((*tokens.shape, VOCABULARY))
    pairs = {"logits": (torch.logits(tokens), tf.logits(tokens))}
    gradients = tf.gradients(tokens, upstream)
    pairs |= {name: (array, gradients[name]) for name, array in torch.gradients(tokens, upstream).items()}
    for name, (expected, array) in pairs.items():
        assert expected.dtype == array.dtype == dtype, name
        np.testing.assert_allclose(
            array, expected, rtol=0, atol=TOLERANCES[dtype] * np.abs(expected).max(), err_msg=name
        )


@pytest.mark.parametrize("context", [1, 2, 7, 8])
def test_the_window_forgets_all_but_half_when_it_is_full(context: int) -> None:
    tokens = np.arange(30)
    window, one_by_one = tokens[:0], Window(context)
    for token in tokens:
        length = len(window)
        window = np.append(window, token)
        if len(window) > context:
            window, length = window[-max(1, context // 2) :], 0
        new, position = one_by_one.add(np.array([token]))
        assert (new.tolist(), position) == (window[length:].tolist(), length)
        at_once, _ = Window(context).add(tokens[: token + 1])
        assert at_once.tolist() == window.tolist()


def test_temperature_zero_takes_the_most_probable_token() -> None:
    rng = np.random.default_rng(0)
    assert choose(np.array([0.0, 2.0, 2.0, 1.0], np.float32), temperature=0, top_k=0, rng=rng) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 2, 9])
def test_tokens_are_drawn_by_their_probabilities(temperature: float, top_k: int) -> None:
    logits = np.array([1000.0, 998.0, 1001.0, -1000.0, 1000.5], np.float32)  # their exponentials overflow
    weights = np.exp((logits - logits.max()) / temperature)
    if top_k:
        weights[np.argsort(-weights)[top_k:]] = 0
    rng = np.random.default_rng(3)
    drawn = [choose(logits, temperature, top_k, rng) for _ in range(2000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / 2000, weights / weights.sum(), atol=0.04)

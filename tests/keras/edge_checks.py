"""What the layer must do under rematerialization, in other types, and with channels in front.

Run by `test_backends.py`; alone: KERAS_BACKEND=jax python -m pytest tests/keras/edge_checks.py
"""

from contextlib import nullcontext
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from tests.keras.layer_checks import (
    BACKEND,
    POLICIES,
    TWO_WAY,
    array,
    built,
    draw,
    gradients,
    start,
)

from steadynorm.keras import BatchNormalization

# Keras's variables have NumPy's old `__array__`, without `copy`.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("policy", ["batch", "steady", "running", "renorm", "renorm=True"])
def test_rematerialization_changes_nothing(policy: str) -> None:
    """On torch; TensorFlow and JAX raise for every layer with moving statistics."""
    if BACKEND != "torch":
        return
    x, grad = 2 * draw(6, 3) + 1, draw(6, 3, seed=1)
    arguments = {"renorm": True} if "=" in policy else {"statistics": POLICIES.get(policy, policy)}
    if policy == "steady":
        arguments = {"statistics": TWO_WAY}
    found = []
    for mode in (None, "full"):
        with keras.RematScope(mode=mode):
            layer = BatchNormalization(activation="tanh", momentum=0.8, **arguments)
        layer.build(x.shape)
        seen = [
            gradient
            for step in range(3)
            for gradient in gradients(layer, x * (step + 1) + step, grad)
        ]
        memory = layer.gradient_memory
        state = [array(w) for w in layer.variables]
        found.append([*seen, *state, *([] if memory is None else [array(memory.value)])])
    for plain, recomputed in zip(*found, strict=True):
        np.testing.assert_allclose(recomputed, plain, atol=1e-6)


def test_a_forward_in_a_backward_pass_without_a_first_run_is_refused() -> None:
    if BACKEND != "torch":
        return
    layer = BatchNormalization(statistics="steady")
    x = ops.convert_to_tensor(draw(4, 3)).requires_grad_()
    y = 2 * x
    y.register_hook(lambda grad: layer(draw(4, 3), training=True) + grad)
    with pytest.raises(RuntimeError, match="no first run of the same batch is known"):
        y.sum().backward()


@pytest.mark.parametrize("policy", ["batch", "steady", "running"])
def test_float64_is_computed_in_float64(policy: str) -> None:
    if BACKEND == "jax":
        import jax

        switched = jax.enable_x64(True) if hasattr(jax, "enable_x64") else nullcontext()
    else:
        switched = nullcontext()
    with switched:
        x = 1e8 + np.random.default_rng(0).standard_normal((64, 3))
        layer = BatchNormalization(dtype="float64", statistics=policy, epsilon=1e-5, momentum=0.0)
        y = layer(ops.convert_to_tensor(x, "float64"), training=True)
        hat = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        np.testing.assert_allclose(array(y), hat, atol=1e-6)
        np.testing.assert_allclose(array(layer.moving_variance), x.var(0), rtol=1e-6)
        if layer.gradient_memory is not None:
            assert keras.backend.standardize_dtype(layer.gradient_memory.value.dtype) == "float64"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("arguments", [{}, {"statistics": "steady"}, {"renorm": True}], ids=str)
def test_pure_half_precision_keeps_float32_statistics(
    dtype: str, arguments: dict[str, Any]
) -> None:
    """A variance of 90,000 is beyond float16."""
    layer = BatchNormalization(dtype=dtype, momentum=0.0, **arguments)
    x = ops.cast(300 * draw(64, 3), dtype)
    wide = array(ops.cast(x, "float32"))
    layer(x, training=True)
    moving = [w for w in layer.non_trainable_variables if len(w.shape)]
    assert {str(w.dtype) for w in moving} == {"float32"}
    assert {str(w.dtype) for w in layer.trainable_variables} == {dtype}
    np.testing.assert_allclose(array(layer.moving_variance), wide.var(0), rtol=1e-5)
    y = layer(x, training=False)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    hat = (wide - wide.mean(0)) / wide.std(0)
    np.testing.assert_allclose(array(ops.cast(y, "float32")), hat, atol=0.02)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("policy", ["batch", "steady", "running", "renorm"])
def test_channels_in_front_are_the_same_batch(policy: str, masked: bool) -> None:
    """(C, N): the samples lie on axis 1."""
    x, mask = draw(11, 3), {"mask": draw(11, seed=3) < 0.5} if masked else {}
    behind, front = (
        built(BatchNormalization, shape, axis=axis, statistics=policy)
        for shape, axis in (((11, 3), 1), ((3, 11), 0))
    )
    expected = array(behind(x, training=True, **mask))
    np.testing.assert_allclose(array(front(x.T, training=True, **mask)).T, expected, atol=1e-6)
    for one, other in zip(front.variables, behind.variables, strict=True):
        np.testing.assert_allclose(array(one), array(other), rtol=1e-5, atol=1e-6)


def test_samples_that_are_masked_out_do_not_count() -> None:
    """Where N is the valid samples: with the memory of the gradient."""
    if BACKEND != "torch":
        return
    x, mask = draw(11, 3), np.arange(11) % 3 > 0
    alone, masked = (start(TWO_WAY, (11, 3), 1)[0] for _ in range(2))
    expected = array(alone(x[mask], training=True))
    np.testing.assert_allclose(
        array(masked(x, training=True, mask=mask))[mask], expected, atol=1e-6
    )
    for one, other in zip(masked.variables, alone.variables, strict=True):
        np.testing.assert_allclose(array(one), array(other), rtol=1e-6)


@pytest.mark.parametrize("fill", [np.nan, -np.inf])
@pytest.mark.parametrize("policy", ["batch", "steady", "running", "renorm"])
def test_what_padding_holds_enters_no_gradient(policy: str, fill: float) -> None:
    """Where the loss leaves it out; the truth is padding of zeros."""
    shape = (6, 5, 3)
    mask = draw(*shape[:2], seed=2) < 0.5
    x, grad = draw(*shape), draw(*shape, seed=1) * mask[..., None]
    found = []
    for padding in (np.float32(fill), np.float32(0)):
        layer = built(BatchNormalization, shape, statistics=policy, activation="tanh")
        filled = np.where(mask[..., None], x, padding)
        moved = gradients(layer, filled, grad, mask=ops.convert_to_tensor(mask))
        found.append([*moved, *map(array, layer.non_trainable_variables)])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)

"""Real networks, converted and folded: the same answers, gradients, buffers and names."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from tests.models.surgery.zoo import ZOO, disturb, train_briefly
from torch import Tensor, nn

from steadynorm.models.bias import drop_redundant_bias
from steadynorm.models.convert import convert
from steadynorm.models.fold import fold
from steadynorm.models.graph import call, tensors
from steadynorm.models.layers import recognize


def relative(theirs: list[Tensor], ours: list[Tensor]) -> float:
    """The largest difference between tensors, each over its own norm."""
    pairs = [(a.double(), b.double()) for a, b in zip(theirs, ours, strict=True) if a.numel()]
    return max((float((a - b).norm() / a.norm().clamp(min=1e-30)) for a, b in pairs), default=0.0)


def step(model: nn.Module, inputs: Any) -> dict[str, list[Tensor]]:
    """Outputs, gradients and buffers of one training step with a random upstream gradient."""
    torch.manual_seed(0)
    outputs = [t for t in tensors(call(model.train(), inputs)) if t.requires_grad]
    generator = torch.Generator().manual_seed(1)
    losses = [(t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in outputs]
    grads: list[Tensor | None] = [None] * len(list(model.parameters()))
    trained = [p for p in model.parameters() if p.requires_grad]
    if losses:
        found = torch.autograd.grad(sum(losses), trained, allow_unused=True)  # type: ignore[arg-type]
        grads = [None if g is None else g for g in found]
    return {
        "outputs": [t.detach() for t in outputs],
        "gradients": [g for g in grads if g is not None],
        "buffers": [b.clone() for n, b in sorted(model.named_buffers()) if "running" in n],
    }


def inference(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return list(tensors(call(model.eval(), inputs)))


@pytest.fixture(autouse=True)
def other_peoples_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(transformers|monai|huggingface_hub|torch)\b")
        yield


@pytest.mark.parametrize("name", ZOO)
def test_convert_and_fold(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = disturb(ZOO[name].build()), ZOO[name].inputs()
    converted, changes = convert(model)
    norms = [m for m in model.modules() if recognize(m) is not None]
    assert changes.tally()["converted"] == len(norms) > 0
    assert set(model.state_dict()) <= set(converted.state_dict())

    expected = inference(model, inputs)
    assert (
        min(float(t.double().std(0).max()) for t in expected if t.ndim > 1) > 1e-3
    )  # sees the input
    assert relative(expected, inference(converted, inputs)) < 1e-5
    for answers in (fold(model, inputs)[0], fold(converted.eval(), inputs)[0]):
        assert relative(expected, inference(answers, inputs)) < 1e-4

    # In float64: gradients through many batch norms of few values amplify float32's own rounding.
    model, converted, inputs = model.double(), converted.double(), inputs.double()
    theirs, ours = step(model, inputs), step(converted, inputs)
    for part in theirs:
        scale = max(float(t.norm()) for t in theirs[part]) if theirs[part] else 0.0
        for a, b in zip(theirs[part], ours[part], strict=True):
            # A gradient that is zero but for rounding is compared with the largest one.
            assert float((a - b).norm()) <= 1e-5 * max(float(a.norm()), 1e-3 * scale), part


@pytest.mark.parametrize("name", ["transformers ResNet (basic)", "MONAI UNet 2d", "MONAI DenseNet"])
def test_after_some_training(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = ZOO[name].build(), ZOO[name].inputs()
    train_briefly(model, inputs)
    expected = inference(model, inputs)
    for changed in (convert(model)[0], fold(model, inputs)[0]):
        assert relative(expected, inference(changed, inputs)) < 1e-4
    assert (
        relative(
            step(copy.deepcopy(model), inputs)["outputs"],
            step(convert(model)[0], inputs)["outputs"],
        )
        < 1e-5
    )


def test_there_and_back() -> None:
    entry = ZOO["transformers RegNet (y)"]
    model, inputs = disturb(entry.build()), entry.inputs()
    back, _ = convert(convert(model)[0], to="torch")
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    assert relative(inference(model, inputs), inference(back, inputs)) == 0


def test_biases_of_a_real_network() -> None:
    entry = ZOO["MONAI BasicUNet"]
    model, inputs = disturb(entry.build()), entry.inputs()
    result, changes = drop_redundant_bias(model, inputs)
    assert changes.tally() == {"dropped": 18}
    assert relative(inference(model, inputs), inference(result, inputs)) < 1e-5

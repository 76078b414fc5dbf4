"""Leaving Python: torch.export, ONNX checked by onnxruntime, torch.jit.trace."""

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import steadynorm as sn

POLICIES = {
    "batch": sn.Batch(),
    "steady": sn.Steady(),
    "running": sn.Running(),
    "renorm": sn.Renorm(warmup=0, r_ramp=2, d_ramp=2),
    "ghost": sn.Ghost(2),
    "frozen": sn.Frozen(),
}
everywhere = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
EPS = 3e-2  # far from every default, so that a lost one shows


def network(policy: sn.Batch) -> Any:
    torch.manual_seed(0)
    made = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), sn.BatchNorm2d(3, EPS, statistics=policy, activation="relu")
    )
    with torch.no_grad():
        for tensor in (made[1].weight, made[1].bias, made[1].running_mean, made[1].running_var):
            tensor.uniform_(0.5, 1.5)
    return made


def data() -> torch.Tensor:
    return torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def exported_in_training(made: Any, x: torch.Tensor, *, strict: bool = False) -> Any:
    """A program; the export warns where no other tool can switch it to inference."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = torch.export.export(copy.deepcopy(made), (x,), strict=strict)
    said = [str(each.message) for each in caught if "in training for ever" in str(each.message)]
    assert bool(said) == (not isinstance(made[1].statistics, sn.Batch | sn.Frozen))
    return program


@pytest.mark.parametrize("activation", [None, "relu"])
def test_training_under_batch_is_exported_as_the_operator_that_other_tools_switch(
    activation: Any,
) -> None:
    """Quantization-aware training (PT2E) looks for it, to fold it and to switch it to inference."""
    made, x = network(sn.Batch()), data()
    made[1].activation = activation
    plain = torch.nn.Sequential(made[0], torch.nn.BatchNorm2d(3, EPS))
    plain[1].load_state_dict(made[1].state_dict())
    names = [
        [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        for program in (exported_in_training(made, x), torch.export.export(plain, (x,)))
    ]
    assert names[0] == names[1] + ["aten.relu.default"] * (activation is not None)
    made[1].momentum = None  # what the operator does not do
    with pytest.warns(UserWarning, match="in training for ever"):
        program = torch.export.export(copy.deepcopy(made), (x,)).module()
    torch.testing.assert_close(program(x), made(x), rtol=1e-5, atol=1e-5)


@everywhere
def test_export_in_training(policy: sn.Batch) -> None:
    """The exported program computes the values and moves its own buffers."""
    made, x = network(policy), data()
    program = exported_in_training(made, x).module()
    for _ in range(2):
        torch.testing.assert_close(program(x), made(x), rtol=1e-5, atol=1e-5)
    exported = dict(program.named_buffers())
    for name, buffer in made.named_buffers():
        torch.testing.assert_close(exported[name], buffer, rtol=1e-5, atol=1e-6)
        assert exported[name].dtype == buffer.dtype


@everywhere
def test_what_is_exported_in_training_can_be_saved(policy: sn.Batch, tmp_path: Path) -> None:
    made, x = network(policy), data()
    program = exported_in_training(made, x).run_decompositions()
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    torch.testing.assert_close(loaded(x), made(x), rtol=1e-5, atol=1e-5)
    buffers = dict(loaded.named_buffers())
    for name, buffer in made.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-5, atol=1e-6)


@everywhere
def test_strict_export_in_training(policy: sn.Batch) -> None:
    """By Dynamo: the same values, and the same warning."""
    made, x = network(policy), data()
    program = exported_in_training(made, x, strict=True).module()
    torch.testing.assert_close(program(x), made(x), rtol=1e-5, atol=1e-5)


@everywhere
def test_export_in_inference(policy: sn.Batch) -> None:
    """One operator that runtimes know, with our eps, for any batch size."""
    made, x = network(policy).eval(), data()
    batch = torch.export.Dim("batch")
    program = torch.export.export(made, (x,), dynamic_shapes=({0: batch},))
    used = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [name for name in used if "batch_norm" in name] == ["aten.batch_norm.default"]
    assert used[-1] == "aten.relu.default"
    torch.testing.assert_close(program.module()(x[:3]), made(x[:3]), rtol=1e-5, atol=1e-5)


def test_onnx(tmp_path: Path) -> None:
    """onnxruntime computes what the layer does; eps survives as an attribute."""
    onnx = pytest.importorskip("onnx", reason="an optional extra")
    runtime = pytest.importorskip("onnxruntime", reason="an optional extra")
    made, x = network(sn.Steady()).eval(), data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(
            made, (x,), tmp_path / "net.onnx", dynamo=True, optimize=False, verbose=False
        )
    nodes = [
        node
        for node in onnx.load(tmp_path / "net.onnx").graph.node
        if node.op_type == "BatchNormalization"
    ]
    assert len(nodes) == 1
    eps = {attribute.name: attribute.f for attribute in nodes[0].attribute}["epsilon"]
    assert eps == pytest.approx(EPS)
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, made(x).detach().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace_in_inference() -> None:
    made, x = network(sn.Steady()).eval(), data()
    traced = torch.jit.trace(made, (x,))
    torch.testing.assert_close(traced(x[:2]), made(x[:2]), rtol=1e-5, atol=1e-5)
    assert "aten::batch_norm" in str(traced.inlined_graph)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_would_keep_the_groups_of_one_batch_size() -> None:
    made, x = network(sn.Ghost(2)), data()
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(NotImplementedError, match="would keep the groups of this batch size"):
        torch.jit.trace(made, (x,))
    torch.testing.assert_close(made.state_dict(), before, rtol=0, atol=0)


def test_onnx_by_a_trace_in_training_warns(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="an optional extra")
    made, training = network(sn.Running()), torch.onnx.TrainingMode.TRAINING
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = tmp_path / "net.onnx"
        torch.onnx.export(made, (data(),), path, dynamo=False, training=training)
    assert any("in training for ever" in str(each.message) for each in caught)

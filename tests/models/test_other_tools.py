"""Other tools on a converted model: what they replace, hook, slice, copy or fold stays right."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from tests.models.sources import block
from tests.models.surgery.test_convert import same
from tests.models.surgery.test_fuse import X4, Block, X
from tests.models.surgery.zoo import disturb
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval

import steadynorm as sn
from steadynorm.models.convert import convert
from steadynorm.models.fold import fold
from steadynorm.models.fuse import Fused


def test_reparameterization_still_works() -> None:
    """As RepVGG's: layers are deleted and another is put in their place."""
    body = """
    if hasattr(self, "one"):
        return self.relu(self.one(x))
    return self.relu(self.bn(self.conv(x)) + self.bn2(self.conv2(x)))
    """
    layers = {"conv2": nn.Conv2d(3, 4, 1), "bn2": nn.BatchNorm2d(4)}
    model = disturb(block(body, **layers)).eval()
    result, _ = convert(model)
    expected = model(X)
    torch.testing.assert_close(result(X), expected, rtol=1e-5, atol=1e-5)
    parts = [fuse_conv_bn_eval(result.conv, result.bn), fuse_conv_bn_eval(result.conv2, result.bn2)]
    for name in ("conv", "bn", "conv2", "bn2"):
        delattr(result, name)
    result.one = nn.Conv2d(3, 4, 1)
    with torch.no_grad():
        result.one.weight.copy_(parts[0].weight + parts[1].weight)
        result.one.bias.copy_(parts[0].bias + parts[1].bias)
    torch.testing.assert_close(result(X), expected, rtol=1e-4, atol=1e-5)


def models() -> list[nn.Module]:
    return [
        disturb(nn.Sequential(Block(True), Block(False))),
        disturb(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Tanh())),
    ]


@pytest.mark.parametrize("which", [0, 1])
def test_other_tools_may_replace_the_layers(which: int) -> None:
    model = models()[which].eval()
    result, _ = convert(model)
    expected = model(X4)
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(result))
    assert any(type(m) is nn.SyncBatchNorm for m in synchronized.modules())
    torch.testing.assert_close(synchronized(X4), expected, rtol=1e-5, atol=1e-5)

    def rebuilt(module: nn.Module) -> None:  # as timm does, from num_features, eps and the tensors
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                new = nn.BatchNorm2d(child.num_features, child.eps, child.momentum).eval()
                new.load_state_dict(child.state_dict())
                setattr(module, name, new)
            else:
                rebuilt(child)

    changed = copy.deepcopy(result)
    rebuilt(changed)
    torch.testing.assert_close(changed(X4), expected, rtol=1e-5, atol=1e-5)
    first = result[0] if which == 0 else result
    conv, norm = ("conv1", "bn1") if which == 0 else ("0", "1")
    setattr(first, conv, fuse_conv_bn_eval(getattr(first, conv), getattr(first, norm)))
    setattr(first, norm, nn.Identity())
    torch.testing.assert_close(result(X4), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", ["bn2", "relu"])
@pytest.mark.parametrize("late", [True, False])
def test_hooks_see_what_they_saw(place: str, late: bool) -> None:
    model = disturb(Block(True))
    seen: dict[bool, list[Tensor]] = {True: [], False: []}

    def listen(network: nn.Module, ours: bool) -> None:
        getattr(network, place).register_forward_hook(
            lambda module, args, output: seen[ours].append(output.clone())
        )

    if late:
        result, _ = convert(model)
        listen(result, True)
        listen(model, False)
    else:
        listen(model, False)
        result, changes = convert(model)
        assert any("hooks" in change.why for change in changes.left)
        getattr(result, place)._forward_hooks.clear()
        listen(result, True)
    model(X4), result(X4)
    assert len(seen[True]) == len(seen[False]) > 0
    for ours, theirs in zip(seen[True], seen[False], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_parts_of_a_converted_model_are_right_by_themselves() -> None:
    model = models()[1]
    result, _ = convert(model)
    for part in (slice(0, 2), slice(0, 3), slice(1, 3)):
        torch.testing.assert_close(result[part](X4), model[part](X4), rtol=1e-5, atol=1e-5)
    children = nn.Sequential(*list(result.children())[:2])
    torch.testing.assert_close(children(X4), model[:2](X4), rtol=1e-5, atol=1e-5)


def test_another_forward_of_the_class_or_the_object_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, result = block("return self.relu(self.bn(self.conv(x)))"), None
    result, _ = convert(model)
    monkeypatch.setattr(type(model), "forward", lambda self, x: x + 1)
    assert torch.equal(result(X), X + 1)
    result.forward = lambda x: x + 2
    assert torch.equal(result(X), X + 2)


def test_fold_after_convert_folds_what_fold_folds() -> None:
    model = models()[0].eval()
    for given in (None, X4):
        alone, both = fold(model, given), fold(convert(model)[0], given)
        assert alone[1].tally() == both[1].tally() == {"folded": 5}
        torch.testing.assert_close(both[0](X4), model(X4), rtol=1e-4, atol=1e-4)


def test_biases_after_convert() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    result, _ = convert(disturb(model))
    result, changes = sn.drop_redundant_bias(result, X4)
    assert changes.tally() == {"dropped": 1}
    assert isinstance(result, Fused)


def test_fused_blocks_are_copied_pickled_and_unfused() -> None:
    model = models()[0]
    result, _ = convert(model)
    same(model, copy.deepcopy(result), X4)
    same(model, pickle.loads(pickle.dumps(result)), X4)
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    same(model, torch.load(file, weights_only=False), X4)
    back, changes = convert(result, to="torch")
    assert type(back[0]) is Block
    assert changes.tally() == {"unfused": 2, "converted": 5}
    same(model, back, X4)


def test_compiled_and_exported() -> None:
    model = models()[0].eval()
    result, _ = convert(model)
    exported = torch.export.export(result, (X4,)).module()
    torch.testing.assert_close(exported(X4), model(X4), rtol=1e-5, atol=1e-5)
    compiled = torch.compile(result, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X4), model(X4), rtol=1e-5, atol=1e-5)


def test_torch_jit_script_says_what_to_do() -> None:
    for model in models():
        result, _ = convert(model)
        with pytest.raises(
            RuntimeError, match=r"torch\.jit\.script cannot compile .*sn\.convert\("
        ):
            torch.jit.script(result)
        back, _ = convert(result.eval(), to="torch")
        torch.testing.assert_close(torch.jit.script(back)(X4), result(X4), rtol=1e-5, atol=1e-5)


def test_other_threads_run_their_models_meanwhile() -> None:
    """torch.fx patches nn.Module for the whole process while it traces."""
    mine, theirs = models()[0].eval(), models()[0].eval()
    expected = theirs(X4)
    wrong: list[Any] = []
    done = threading.Event()

    def run() -> None:
        try:
            while not done.is_set():
                if not torch.equal(theirs(X4), expected):
                    wrong.append("another result")
        except Exception as error:  # noqa: BLE001
            wrong.append(error)

    def trace() -> None:
        tallies = [fold(mine)[1].tally() for _ in range(10)]
        wrong.extend(tally for tally in tallies if tally != {"folded": 5})

    runner = threading.Thread(target=run)
    folders = [threading.Thread(target=trace) for _ in range(2)]
    for thread in (runner, *folders):
        thread.start()
    for thread in folders:
        thread.join()
    done.set()
    runner.join()
    assert wrong == []
    assert torch.equal(theirs(X4), expected)


@pytest.mark.parametrize("training", [True, False])
def test_torch_fx_takes_our_layers_whole(training: bool) -> None:
    for model in models():
        result, _ = convert(model)
        norms = [name for name, m in result.named_modules() if isinstance(m, sn.BatchNorm2d)]
        traced = torch.fx.symbolic_trace(result.train(training))
        called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
        assert set(norms) <= set(called)
        same(model, traced, X4)
    layer = sn.BatchNorm2d(4)
    graph = torch.fx.symbolic_trace(nn.Sequential(layer)).graph
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]


def test_statistics_not_tracked_under_a_policy_that_needs_them() -> None:
    """As Lightning's BaseFinetuning.freeze(train_bn=False) sets it."""
    result, _ = convert(models()[1], "steady")
    result[1].track_running_stats = False
    with pytest.raises(
        ValueError, match=r"needs running statistics; got none .*sn\.Batch\(\).*sn\.freeze\(layer\)"
    ):
        result.train()(X4)
    result.eval()(X4)  # as torch's: inference goes by what there is


def test_a_momentum_that_steady_does_not_use_is_said() -> None:
    _, changes = convert(nn.Sequential(nn.BatchNorm2d(4, momentum=0.01)), "steady")
    assert changes[0].why.endswith("its momentum, 0.01, is not used: the horizon takes its place")


def test_classes_that_others_make_of_fused_blocks_are_kept() -> None:
    """As FSDP's fully_shard does, and torch.nn.utils.parametrize."""
    result, _ = convert(models()[0].eval())
    theirs = type("Sharded", (type(result[0]),), {})
    result[0].__class__ = theirs
    for given in (None, X4):
        folded, changes = fold(result, given)
        assert changes.tally() == {"folded": 5}
        torch.testing.assert_close(folded(X4), result(X4), rtol=1e-4, atol=1e-4)
    assert type(result[0]) is theirs
    back, _ = convert(result, to="torch", inplace=True)
    assert type(back[0]) is theirs


@pytest.mark.parametrize("name", ["weight", "running_var"])
def test_a_parametrized_layer_is_left_and_still_runs(name: str) -> None:
    """Its class holds the parametrization: with another it would have no weight at all."""
    layer, x = nn.BatchNorm2d(3), torch.randn(4, 3, 2, 2)
    parametrize.register_parametrization(layer, name, nn.Softplus())
    expected = copy.deepcopy(layer)(x)
    for change in (sn.convert, sn.freeze):
        result, changes = change(nn.Sequential(layer))
        assert [(row.what, row.why) for row in changes] == [
            ("left", "its weights are parametrized")
        ]
        assert torch.equal(copy.deepcopy(result)(x), expected)
    ours = sn.BatchNorm2d(3)
    parametrize.register_parametrization(ours, name, nn.Softplus())
    result, changes = sn.convert(nn.Sequential(ours), to="torch")
    assert changes.tally() == {"left": 1}
    torch.testing.assert_close(result(x), expected, rtol=0, atol=1e-6)

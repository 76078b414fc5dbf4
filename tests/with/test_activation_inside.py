"""A layer with an activation inside: tools that build another layer from it would drop it."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import steadynorm as sn

X = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(0))


class Frozen(nn.Module):
    """As torchvision's, detectron2's and timm's `FrozenBatchNorm2d`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        scale: Any = self.weight * (self.running_var + self.eps).rsqrt()
        shift: Any = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class NormAct(nn.BatchNorm2d):
    """As timm's `BatchNormAct2d`."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(super().forward(x))
        return out


def synchronized(network: nn.Module) -> Any:
    return nn.SyncBatchNorm.convert_sync_batchnorm(network)


def frozen(network: Any) -> Any:
    """timm's `freeze_batch_norm_2d`, detectron2's `convert_frozen_batchnorm`."""
    norm = network[1]
    made: Any = Frozen(norm.num_features)
    made.load_state_dict(norm.state_dict(), strict=False)
    made.eps = norm.eps
    network[1] = made
    return network


def split(network: Any) -> Any:
    """timm's `convert_splitbn_model`, apex's `convert_syncbn_model`."""
    norm = network[1]
    made = nn.BatchNorm2d(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    )
    made.load_state_dict(norm.state_dict())
    network[1] = made.eval()
    return network


def grouped(network: Any) -> Any:
    """Opacus's `ModuleValidator.fix`."""
    network[1] = nn.GroupNorm(1, network[1].num_features, affine=network[1].affine)
    return network


def fused(network: Any) -> Any:
    network[0], network[1] = fuse_conv_bn_eval(network[0], network[1]), nn.Identity()
    return network


def network(activation: str | None, *, converted: bool = False) -> Any:
    torch.manual_seed(0)
    norm: Any = NormAct(4) if converted else sn.BatchNorm2d(4, activation=activation)
    made: Any = nn.Sequential(nn.Conv2d(3, 4, 3), norm)
    for _ in range(5):
        made(X)
    return sn.convert(made.eval())[0]


REBUILD = pytest.mark.parametrize("rebuild", [synchronized, frozen, split, grouped, fused])


@REBUILD
@pytest.mark.parametrize("converted", [False, True])
def test_what_builds_another_layer_from_it_raises(
    rebuild: Callable[[Any], Any], converted: bool
) -> None:
    made = network("relu", converted=converted)
    assert made[1].activation == "relu"
    with pytest.raises(RuntimeError, match=r"lose the relu\. Use sn\.convert\(model, synchronize="):
        rebuild(made)


@REBUILD
def test_without_an_activation_inside_it_works(rebuild: Callable[[Any], Any]) -> None:
    made = network(None)
    expected = made(X)
    found = rebuild(copy.deepcopy(made))(X)
    if rebuild is not grouped:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_message() -> None:
    with pytest.raises(RuntimeError) as raised:
        _ = network("relu")[1].eps
    assert str(raised.value) == (
        "BatchNorm2d: `eps` is not given to other tools while the layer has an activation inside: "
        "what they build from it would lose the relu. Use sn.convert(model, synchronize=True), "
        "sn.freeze or sn.fold; or set `activation` to None and put a module for it after the "
        "layer. To read it nevertheless: vars(layer)['eps']."
    )
    with pytest.raises(RuntimeError, match="BatchNorm2d: `num_features` is not given"):
        _ = network("relu")[1].num_features


def test_the_cures() -> None:
    made = network("relu")
    expected = made(X)
    made[1].eps = 1e-5  # may be set
    for cured in (
        sn.convert(made, synchronize=True)[0],
        sn.freeze(made)[0],
        sn.fold(made)[0],
    ):
        torch.testing.assert_close(cured(X), expected, rtol=1e-4, atol=1e-5)
    made[1].activation = None
    made.append(nn.ReLU())
    torch.testing.assert_close(synchronized(made)(X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_reads_every_attribute_still_works() -> None:
    made = network("relu")
    layer, y = made[1], made(X)
    members = dict(inspect.getmembers(layer))
    assert members["momentum"] == 0.1
    assert "eps" not in members
    assert "eps" in dir(network(None)[1])
    x = made[0](X).detach()
    for same in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.jit.trace(layer, (x,)),
        torch.fx.symbolic_trace(nn.Sequential(layer)),
    ):
        torch.testing.assert_close(same(x), y)

"""`torch.ao.quantization.fuse_modules` on our layers: right in inference, else a clear error."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steadynorm as sn
from steadynorm.nn.eager_quantization import register

quantization = pytest.importorskip("torch.ao.quantization", reason="deprecated: it may go")

RELU = (nn.ReLU(),)
CASES: dict[str, tuple[nn.Module, Any, tuple[int, ...]]] = {
    "Linear": (nn.Linear(3, 4), sn.BatchNorm1d, (6, 3)),
    "Conv1d": (nn.Conv1d(3, 4, 3), sn.BatchNorm1d, (6, 3, 7)),
    "Conv2d": (nn.Conv2d(3, 4, 3), sn.BatchNorm2d, (6, 3, 7, 5)),
    "Conv3d": (nn.Conv3d(3, 4, 3), sn.BatchNorm3d, (6, 3, 7, 5, 3)),
    "ConvTranspose1d": (nn.ConvTranspose1d(3, 4, 3), sn.BatchNorm1d, (6, 3, 7)),
    "ConvTranspose2d": (nn.ConvTranspose2d(3, 4, 3), sn.BatchNorm2d, (6, 3, 7, 5)),
    "ConvTranspose3d": (nn.ConvTranspose3d(3, 4, 3), sn.BatchNorm3d, (6, 3, 7, 5, 3)),
}


def fused(network: nn.Module, *, training: bool = False) -> Any:
    function = quantization.fuse_modules_qat if training else quantization.fuse_modules
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch points to torchao
        return function(network, [list(network._modules)])


def trained(before: nn.Module, layer: Any, shape: tuple[int, ...], *after: nn.Module) -> Any:
    """In double precision, with statistics, weight and bias that are not those of a new layer."""
    torch.manual_seed(0)
    network = nn.Sequential(before, layer(4, statistics="steady"), *after).double()
    norm: Any = network[1]
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
        for _ in range(5):
            network(3 * torch.randn(shape, dtype=torch.double) + 1)
    return network.eval()


def by_definition(network: Any, x: Tensor) -> Tensor:
    """Of a convolution or linear layer, a batch norm and perhaps a ReLU, in inference."""
    y, norm = network[0](x), network[1]
    form = (1, -1, *(1,) * (y.ndim - 2))
    mean, var, weight, bias = (
        t.view(form) for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    y = (y - mean) / (var + norm.eps).sqrt() * weight + bias
    return y.clamp(min=0) if len(network) == 3 else y


@pytest.mark.parametrize("name", CASES)
def test_in_inference_a_batch_norm_goes_into_the_layer_before_it(name: str) -> None:
    before, layer, shape = CASES[name]
    relus = ((), RELU) if name.startswith("Conv") and "Transpose" not in name else ((),)
    for after in relus:
        network = trained(before, layer, shape, *after)
        x = torch.randn(shape, dtype=torch.double)
        found = fused(network)
        assert not any(isinstance(module, layer) for module in found.modules())
        torch.testing.assert_close(found(x), by_definition(network, x), rtol=1e-10, atol=1e-10)


CURE = r'Use model\.eval\(\) and sn\.fold, or .* sn\.convert\(model, to="torch"\) first\.$'


def test_elsewhere_an_error_says_what_to_do() -> None:
    before, layer, shape = CASES["Conv2d"]
    network = trained(before, layer, shape, *RELU)
    with pytest.raises(RuntimeError, match=r"got BatchNorm2d, ReLU, in inference\. " + CURE):
        fused(network[1:])
    network.train()
    for training in (True, False):
        with pytest.raises(
            RuntimeError, match=r"got Conv2d, BatchNorm2d, ReLU, in training\. " + CURE
        ):
            fused(network, training=training)
    back, _ = sn.convert(network, to="torch")
    x = torch.randn(shape, dtype=torch.double)
    expected = by_definition(network, x)
    torch.testing.assert_close(fused(back, training=True).eval()(x), expected)


def test_an_activation_inside_is_not_lost() -> None:
    before, _, shape = CASES["Conv2d"]
    network = trained(
        before, lambda size, **given: sn.BatchNorm2d(size, activation="relu", **given), shape
    )
    with pytest.raises(RuntimeError, match=r"would lose the relu\. Use .*sn\.fold"):
        fused(network)


def test_rows_of_torchs_own_layers_stay() -> None:
    from torch.ao.quantization import fuser_method_mappings as torchs

    table = torchs._DEFAULT_OP_LIST_TO_FUSER_METHOD
    before = dict(table)
    register({nn.BatchNorm2d: sn.BatchNorm2d})  # again
    assert table == before
    assert table[nn.Conv2d, nn.BatchNorm2d] is torchs.fuse_conv_bn
    assert (
        sum(any(issubclass(kind, sn.nn.batchnorm.SteadyNorm) for kind in row) for row in table)
        == 12
    )

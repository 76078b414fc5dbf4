"""Where the definition runs out: one value, no value, last ghosts, one warning, no half update."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch

import steadynorm as sn

POLICIES = {
    "batch": sn.Batch(),
    "steady": sn.Steady(),
    "running": sn.Running(),
    "renorm": sn.Renorm(),
    "ghost": sn.Ghost(4),
    "frozen": sn.Frozen(),
}
everywhere = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def trained(policy: sn.Batch, channels: int = 3, kind: Any = sn.BatchNorm1d) -> Any:
    """A layer whose statistics and parameters are not the initial ones."""
    layer = kind(channels, statistics=policy)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            tensor.copy_(torch.rand(channels, generator=random) + 0.5)
        layer.num_batches_tracked.fill_(7)
    return layer


def state(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


def assert_untouched(layer: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("policy", "shape", "kind"),
    [
        (sn.Batch(), (1, 3), sn.BatchNorm1d),
        (sn.Batch(), (1, 3, 1), sn.BatchNorm1d),
        (sn.Batch(), (1, 3, 1, 1), sn.BatchNorm2d),
        (sn.Batch(), (1, 3, 1, 1, 1), sn.BatchNorm3d),
        (sn.Ghost(4), (1, 3), sn.BatchNorm1d),
        (sn.Ghost(1), (5, 3), sn.BatchNorm1d),
    ],
)
def test_one_value_per_channel_is_refused(policy: Any, shape: tuple[int, ...], kind: Any) -> None:
    layer = trained(policy, kind=kind)
    before = state(layer)
    with pytest.raises(ValueError, match="more than one value per channel"):
        layer(torch.randn(shape))
    assert_untouched(layer, before)


@pytest.mark.parametrize("policy", [sn.Batch(), sn.Ghost(2)], ids=repr)
def test_one_valid_value_is_refused(policy: sn.Batch) -> None:
    """With a mask only the data tell; a ghost group may be the one that holds a single value."""
    layer = trained(policy)
    before = state(layer)
    mask = torch.tensor([False, True, False, False])
    with pytest.raises(ValueError, match="more than one value per channel"):
        layer(torch.randn(4, 3), mask=mask)
    assert_untouched(layer, before)


@pytest.mark.parametrize("name", ["steady", "running", "frozen", "renorm"])
@pytest.mark.filterwarnings("ignore:.*no gradient")
def test_one_value_per_channel_works(name: str) -> None:
    """Against the definitions of SEMANTICS in NumPy, from statistics that have seen 7 batches."""
    layer = trained(POLICIES[name])
    weight, bias, mean, var, _ = (v.double().numpy() for v in state(layer).values())
    x = np.array([[0.3, -1.0, 2.5]])
    y = layer(torch.tensor(x, dtype=torch.float32)).detach().numpy()
    if name == "steady":
        k = a = 1 / 8  # max(1 / (1 + 16), 1 / 8) and max(1 / 641, 1 / 8)
        m, u = mean + k * (x - mean), (1 - k) * (var + k * (x - mean) ** 2)
        new_mean, new_var = mean + a * (x - mean), (1 - a) * (var + a * (x - mean) ** 2)
    elif name == "running":
        a = 1 / 8  # above the momentum of 0.1
        m = new_mean = mean + a * (x - mean)
        u = new_var = (1 - a) * var
    elif name == "frozen":
        m, u, new_mean, new_var = mean, var, mean, var
    else:  # renorm in its warm-up: x - mean of the batch is 0
        m, u, new_mean, new_var = x, 0 * x, mean + 0.1 * (x - mean), 0.9 * var
    np.testing.assert_allclose(y, (x - m) / np.sqrt(u + 1e-5) * weight + bias, rtol=1e-5)
    np.testing.assert_allclose(layer.running_mean, np.ravel(new_mean), rtol=1e-6)
    np.testing.assert_allclose(layer.running_var, np.ravel(new_var), rtol=1e-6)
    assert int(layer.num_batches_tracked) == (7 if name == "frozen" else 8)


def test_renorm_warns_once_of_one_value() -> None:
    policy = sn.Renorm(r_max=2.5)  # that no other test has warned of
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            trained(policy)(torch.randn(1, 3))
    assert [str(warning.message) for warning in seen] == [
        "BatchNorm1d: one value per channel under Renorm(r_max=2.5, d_max=5.0, warmup=5000, "
        "r_ramp=35000, d_ramp=20000): x - mean is 0, so no gradient reaches the input. Use "
        "sn.Steady()."
    ]
    assert seen[0].category is UserWarning


@everywhere
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (4, 3, 0)])
def test_an_empty_batch_updates_nothing(policy: sn.Batch, shape: tuple[int, ...]) -> None:
    layer = trained(policy)
    before = state(layer)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert torch.equal(layer.weight.grad, torch.zeros(3))
    assert torch.equal(layer.bias.grad, torch.zeros(3))
    assert_untouched(layer, before)


@everywhere
def test_a_mask_without_a_valid_position_normalizes_by_running_statistics(policy: Any) -> None:
    layer = trained(policy)
    before = state(layer)
    x = torch.randn(6, 3, 5, requires_grad=True)
    grad = torch.randn(6, 3, 5)
    y = layer(x, mask=torch.zeros(6, 5, dtype=torch.bool))
    y.backward(grad)
    inference = trained(policy).eval()
    x_inference = x.detach().clone().requires_grad_()
    expected = inference(x_inference)
    expected.backward(grad)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, x_inference.grad, rtol=1e-6, atol=1e-6)
    assert_untouched(layer, before)


@pytest.mark.parametrize(
    ("samples", "lengths"), [(7, (3, 4)), (8, (3, 3, 2)), (2, (2,)), (10, (3, 3, 4))]
)
def test_a_last_ghost_of_one_sample_joins_the_one_before(
    samples: int, lengths: tuple[int, ...]
) -> None:
    layer = trained(sn.Ghost(3))
    truth = trained(sn.Batch())
    x = torch.randn(samples, 3)
    y = layer(x)
    expected = torch.cat([truth(group) for group in x.split(lengths)])
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(layer.state_dict(), truth.state_dict(), rtol=1e-6, atol=1e-6)


def test_a_ghost_group_without_a_valid_position_is_left_out() -> None:
    layer = trained(sn.Ghost(2))
    truth = trained(sn.Ghost(2))
    x = torch.randn(6, 3, 4)
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[2:4] = False
    layer(x, mask=mask)
    truth(torch.cat([x[:2], x[4:]]))
    torch.testing.assert_close(layer.state_dict(), truth.state_dict(), rtol=1e-6, atol=1e-6)


@everywhere
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_skip_keeps_batches_that_are_not_finite_out(policy: sn.Batch, value: float) -> None:
    layer = trained(policy)
    layer.nonfinite = "skip"
    before = state(layer)
    x = torch.randn(8, 3)
    x[2, 1] = value
    assert not layer(x).isfinite().all()
    assert_untouched(layer, before)
    layer(torch.randn(4, 3))
    assert int(layer.num_batches_tracked) == (7 if isinstance(policy, sn.Frozen) else 8)


@everywhere
def test_propagate_is_as_in_torch(policy: sn.Batch) -> None:
    if isinstance(policy, sn.Frozen):
        pytest.skip("frozen statistics take nothing in")
    layer = trained(policy)
    x = torch.randn(8, 3)
    x[2, 1] = float("nan")
    layer(x)
    assert layer.running_mean.isnan().tolist() == [False, True, False]
    assert layer.running_var.isnan().tolist() == [False, True, False]


def test_without_running_statistics_the_batch_serves_in_inference() -> None:
    layer = sn.BatchNorm1d(3, track_running_stats=False).eval()
    x = torch.randn(5, 3)
    expected = torch.nn.BatchNorm1d(3, track_running_stats=False).eval()(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("kind", [sn.LazyBatchNorm1d, sn.LazyBatchNorm2d, sn.LazyBatchNorm3d])
def test_a_refused_first_call_of_a_lazy_layer_moves_nothing(kind: Any) -> None:
    axes = {"1": 2, "2": 4, "3": 5}[kind.__name__[-2]]
    layer = kind()
    with pytest.raises(ValueError, match="more than one value per channel"):
        layer(torch.randn(1, 3, *(1,) * (axes - 2)))
    assert int(layer.num_batches_tracked) == 0
    assert layer(torch.randn(4, 3, *(2,) * (axes - 2))).shape[1] == 3
    assert int(layer.num_batches_tracked) == 1

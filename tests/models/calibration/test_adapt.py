"""Mixing the statistics of shifted data in, against the paper's formula in float64."""

import numpy as np
import pytest
import torch
from torch import nn

import steadynorm as sn


def model(norm: type[nn.Module], **options: object) -> nn.Sequential:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), norm(3, **options), nn.ReLU(),
                            nn.Conv2d(3, 4, 1), norm(4, **options))  # fmt: skip
    for layer in network[1::3]:
        layer.running_mean.uniform_(-1, 1)
        layer.running_var.uniform_(0.5, 2)
    return network


def mixed(layer: nn.Module, x: torch.Tensor, prior: float, ddof: int) -> tuple[np.ndarray, ...]:
    """Schneider et al. 2020: N/(N + n) of the source, n/(N + n) of the target, n in samples."""
    n = len(x)
    flat = x.double().movedim(1, 0).flatten(1).numpy()
    target = flat.mean(1), flat.var(1, ddof=ddof)
    source = layer.running_mean.double().numpy(), layer.running_var.double().numpy()
    return tuple(
        prior / (prior + n) * s + n / (prior + n) * t for s, t in zip(source, target, strict=True)
    )


def normalized(x: torch.Tensor, mean: np.ndarray, var: np.ndarray) -> torch.Tensor:
    mean, std = (torch.from_numpy(v).view(-1, 1, 1) for v in (mean, np.sqrt(var + 1e-5)))
    return ((x - mean) / std).clamp(min=0)


@pytest.mark.parametrize("passes", ["one", "layerwise"])
@pytest.mark.parametrize("prior", [1e-3, 2, 16, 1e6])
@pytest.mark.parametrize(("norm", "ddof"), [(nn.BatchNorm2d, 1), (sn.BatchNorm2d, 1)])
@torch.no_grad()
def test_one_batch_is_the_papers_procedure(
    norm: type[nn.Module], ddof: int, prior: float, passes: str
) -> None:
    x = torch.randn(5, 2, 6, 6) * 3 + 2
    network, source = model(norm), model(norm).double()
    sn.adapt(network, [x], prior=prior, passes=passes, progress=False)
    inner = source[0](x.double())
    first = mixed(source[1], inner, prior, ddof)
    second = mixed(source[4], source[3](normalized(inner, *first)), prior, ddof)
    for layer, (mean, var) in ((network[1], first), (network[4], second)):
        np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(layer.running_var.numpy(), var, rtol=1e-5)


def test_policies_that_keep_the_biased_variance_mix_the_biased_one() -> None:
    x = torch.tensor([[4.0], [6.0]])
    layer = sn.BatchNorm1d(1, statistics="steady")
    sn.adapt(layer, [x], prior=6, progress=False)
    assert (layer.running_mean.item(), layer.running_var.item()) == (1.25, 1.0)


def test_batches_count_together() -> None:
    x = torch.randn(9, 3, 2, 2) + 4
    kept = []
    for batches in ([x], x.split(2)):
        layer = nn.BatchNorm2d(3)
        sn.adapt(layer, batches, prior=7, progress=False)
        kept.append(layer)
    torch.testing.assert_close(kept[0].running_mean, kept[1].running_mean)
    torch.testing.assert_close(kept[0].running_var, kept[1].running_var)


@pytest.mark.parametrize("left_out", ["masked", "masked beside others", "not finite"])
def test_samples_that_are_left_out_do_not_count(left_out: str) -> None:
    x = torch.tensor([[4.0], [6.0]])
    valid, none = torch.tensor([True, True]), torch.tensor([False, False])
    batches = {
        "masked": [(x, valid), (x, none)],
        "masked beside others": [(torch.cat([x, x]), torch.cat([valid, none]))],
        "not finite": [(x, valid), (x / 0, valid)],
    }[left_out]
    layer = sn.BatchNorm1d(1, nonfinite="skip")
    sn.adapt(
        layer, batches, prior=6, progress=False, forward=lambda model, b: model(b[0], mask=b[1])
    )
    assert (layer.running_mean.item(), layer.running_var.item()) == (1.25, 1.25)
    assert layer.num_batches_tracked.item() == 1


class Recurrent(nn.Module):
    """Feeds its batch norm with what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(3 * self.norm(x) + 1)


def test_every_pass_mixes_with_the_same_source() -> None:
    x = torch.tensor([[1.0], [2.0], [6.0], [7.0]])
    network = nn.Sequential(nn.BatchNorm1d(1), Recurrent())
    sn.adapt(network, [x], prior=4, passes="layerwise", progress=False)
    first = (4 * 0 + 4 * 4) / 8, (4 * 1 + 4 * 26 / 3) / 8  # mean 4, unbiased variance 26/3
    inner = (x.double().numpy() - first[0]) / np.sqrt(first[1] + 1e-5)
    mean, var = inner.mean() / 2, (1 + inner.var(ddof=1)) / 2
    again = 3 * (inner - mean) / np.sqrt(var + 1e-5) + 1
    both = np.concatenate([inner, again])  # 8 samples at the layer, over its two calls
    np.testing.assert_allclose(network[1].norm.running_mean.item(), both.mean() * 8 / 12, rtol=1e-5)
    expected = (4 + 8 * both.var(ddof=1)) / 12
    np.testing.assert_allclose(network[1].norm.running_var.item(), expected, rtol=1e-5)


def test_no_prior_is_calibration() -> None:
    x = torch.randn(9, 2, 5, 5)
    adapted, calibrated = model(nn.BatchNorm2d), model(nn.BatchNorm2d)
    adapted[1].running_mean.fill_(torch.nan)  # has no say
    sn.adapt(adapted, x.split(4), prior=0, passes="layerwise", progress=False)
    sn.calibrate(calibrated, x.split(4), passes="layerwise", progress=False)
    for name, value in calibrated.state_dict().items():
        torch.testing.assert_close(adapted.state_dict()[name], value)


def test_it_helps_on_shifted_data() -> None:
    """A layer that feeds a threshold: right on the source, wrong after a shift, mended by both."""
    source = torch.randn(400, 1, generator=torch.Generator().manual_seed(0))
    layer = nn.BatchNorm1d(1).eval()
    sn.calibrate(layer, [source], progress=False)
    shifted = source * 2 + 3

    def agreement() -> float:
        return float(((layer(shifted) > 0) == (source > 0)).double().mean())

    assert agreement() < 0.65
    sn.adapt(layer, [shifted], prior=16, progress=False)
    assert agreement() > 0.95


@pytest.mark.parametrize(
    ("prior", "error", "message"),
    [
        ("16", TypeError, "adapt: `prior` must be a number; got '16'."),
        (True, TypeError, "adapt: `prior` must be a number; got True."),
        (-1, ValueError, "adapt: `prior` must be finite and at least 0; got -1."),
        (float("inf"), ValueError, "adapt: `prior` must be finite and at least 0; got inf."),
    ],
)
def test_refused_priors(prior: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as refusal:
        sn.adapt(nn.BatchNorm1d(1), [torch.ones(2, 1)], prior=prior)
    assert str(refusal.value) == message


def test_poisoned_statistics_cannot_be_mixed() -> None:
    layer = nn.BatchNorm1d(1)
    layer.running_var.fill_(torch.inf)
    with pytest.raises(ValueError) as refusal:
        sn.adapt(nn.Sequential(layer), [torch.ones(2, 1)], progress=False)
    assert str(refusal.value) == (
        "adapt: running statistics must be finite to be mixed; those of '0' are not. Use "
        "calibrate, which leaves them out."
    )

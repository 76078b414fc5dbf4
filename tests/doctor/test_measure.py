"""Evidence of batches, against NumPy, and that gathering it changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.calibration.test_untouched import model as awkward
from tests.models.calibration.test_untouched import picture
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import steadynorm as sn
from steadynorm.doctor.evidence.records import Evidence, NormData


def seen(model: nn.Module, batches: Any, **given: Any) -> Evidence:
    return sn.diagnose(model, batches, **given).evidence


def data(evidence: Evidence, index: int = 0) -> NormData:
    found = evidence.layers[index].data
    assert found is not None
    return found


def smooth(samples: int, count: int, *, channels: int = 6, length: int = 32) -> list[Tensor]:
    """Sequences whose neighbours are alike: moving averages over 8 of independent values."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, samples, channels, length + 7, generator=generator)
    return list(x.unfold(3, 8, 1).mean(-1).unbind(0))


def test_moments_in_training_are_numpys() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 5), nn.BatchNorm1d(5)).eval()
    batches = [torch.randn(16, 3) * 2 + 1 for _ in range(20)]
    first, second = (data(seen(model, batches), index) for index in (0, 1))

    x = np.stack([batch.double().numpy() for batch in batches])
    np.testing.assert_allclose(first.mean, x.mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(first.var, x.var((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(first.var_of_means, x.mean(1).var(0, ddof=1), rtol=1e-5)

    eps, linear = model[0].eps, model[1]
    weight, bias = (p.detach().double().numpy() for p in (linear.weight, linear.bias))
    by_batch = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + eps)
    by_running = x / np.sqrt(1 + eps)
    for values, mean, var in (
        (by_batch, second.mean, second.var),
        (by_running, second.inference_mean, second.inference_var),
    ):
        z = values @ weight.T + bias
        np.testing.assert_allclose(mean, z.mean((0, 1)), atol=1e-6)
        np.testing.assert_allclose(var, z.var((0, 1)), rtol=1e-5)


def test_worth_is_by_how_far_samples_scatter() -> None:
    batches = [batch + 5 for batch in smooth(16, 24)]
    batches[0] += 1  # the pivot is off
    layer = data(seen(nn.BatchNorm1d(6).eval(), batches))
    x = torch.cat(batches).double().numpy()
    mean, var = x.mean((0, 2)), x.var((0, 2))
    of_mean = 1 / np.mean(x.mean(2).var(0) / var)
    squares = ((x - mean[:, None]) ** 2).mean(2)
    of_var = 1 / np.mean(squares.var(0) / (2 * var**2))
    assert layer.worth_of_mean == pytest.approx(of_mean, rel=1e-4)
    assert layer.worth_of_var == pytest.approx(of_var, rel=1e-4)
    assert layer.worth == min(layer.worth_of_mean, layer.worth_of_var)


def test_worth_foretells_the_noise_of_batches() -> None:
    """Of 32 positions, alike over 8, about 4 are independent; batches' own statistics agree."""
    batches = smooth(16, 200)
    layer = data(seen(nn.BatchNorm1d(6).eval(), batches, max_batches=200))
    assert layer.worth_of_mean is not None
    assert layer.worth_of_var is not None
    assert 3 < layer.worth_of_mean < 5
    x = torch.stack(batches).double().numpy()
    var = x.var((0, 1, 3))
    off_mean = np.mean(x.mean((1, 3)).var(0) / var)
    off_var = np.mean(x.var((1, 3)).var(0) / var**2)
    assert 1 / (16 * layer.worth_of_mean) == pytest.approx(off_mean, rel=0.15)
    assert 2 / (16 * layer.worth_of_var) == pytest.approx(off_var, rel=0.15)
    assert layer.effective == pytest.approx(1 / off_mean, rel=0.02)


def test_independent_positions_are_worth_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(64, 8, 10, generator=generator) for _ in range(16)]
    assert data(seen(nn.BatchNorm1d(8).eval(), batches)).worth == pytest.approx(10, rel=0.15)


@pytest.mark.parametrize(("copies", "expected"), [(1, 6.0), (20, 6.0)])
def test_channels_that_say_the_same_are_counted_once(copies: int, expected: float) -> None:
    """By the eigenvalues of the covariance of the samples' means, in standard deviations."""
    x = torch.stack(smooth(16, 24)).repeat_interleave(copies, 2)
    layer = data(seen(nn.BatchNorm1d(x.shape[2]).eval(), list(x + 5)))
    assert layer.independent_channels == pytest.approx(expected, rel=0.1)
    some = x[:, :, :: -(-x.shape[2] // 64)].flatten(0, 1).double().numpy()
    scaled = some.mean(2) / some.std((0, 2))
    found = np.linalg.eigvalsh(np.cov(scaled.T, bias=True))
    assert layer.independent_channels == pytest.approx(found.sum() ** 2 / (found**2).sum())


def test_the_scatter_of_mixed_batches_is_as_the_channels_foretell() -> None:
    """Its variance is 2/ν, ν the independent channels times (batches - 1)."""
    chance = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, generator=chance) * torch.linspace(0.2, 2, 12)[:, None]
    ratios, limits = [], []
    for _ in range(60):
        x = torch.randn(8, 16, 12, generator=chance) @ mix
        layer = data(seen(nn.BatchNorm1d(12).eval(), list(x)))
        assert layer.effective is not None
        assert layer.worth_of_mean is not None
        assert layer.independent_channels is not None
        ratios.append(16 * layer.worth_of_mean / layer.effective)
        limits.append(2 / (7 * layer.independent_channels))
    assert np.mean(ratios) == pytest.approx(1, abs=0.1)
    assert np.var(ratios) == pytest.approx(np.mean(limits), rel=0.5)


def test_positions_in_the_batch_axis_are_told_from_samples() -> None:
    class Flattened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(x.transpose(1, 2).flatten(0, 1))
            return y.unflatten(0, (len(x), -1))

    batches = smooth(16, 24)
    apart, together = (data(seen(m.eval(), batches)) for m in (nn.BatchNorm1d(6), Flattened()))
    assert together.worth == pytest.approx(apart.worth, rel=1e-5)
    assert together.samples == 16


def test_a_mask_leaves_positions_out() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = sn.BatchNorm1d(2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.norm(x, mask=mask)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 2, 5, generator=generator)
    mask = torch.rand(8, 5, generator=generator) < 0.6
    layer = data(seen(Masked().eval(), [dict(x=x, mask=mask)] * 3))
    valid = x.movedim(1, 2)[mask].double().numpy()
    np.testing.assert_allclose(layer.mean, valid.mean(0), atol=1e-6)
    np.testing.assert_allclose(layer.var, valid.var(0), rtol=1e-5)
    assert (layer.masked, layer.padding, layer.values) == (True, None, 3 * len(valid))


@pytest.mark.parametrize("side", ["end", "beginning"])
def test_padding_is_found_behind_a_convolutions_own_zeros(side: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 3, 20) + 2
    lengths = torch.randint(8, 18, (12,))
    valid = torch.arange(20)[None] < lengths[:, None]
    x = x * valid[:, None]
    x, valid = (x.flip(2), valid.flip(1)) if side == "beginning" else (x, valid)
    model = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4)).eval()
    padding = data(seen(model, [x] * 2)).padding
    assert padding is not None
    # The convolution reaches one position into the padding.
    assert padding.share == pytest.approx(float((~valid).float().mean()) - 1 / 20, abs=0.01)


def test_a_pictures_margins_are_no_padding() -> None:
    torch.manual_seed(0)
    x = torch.zeros(16, 1, 20, 20)
    for picture_ in x:  # a figure somewhere in the middle, on a plain ground
        top, left = torch.randint(3, 8, (2,)).tolist()
        picture_[:, top : top + 8, left : left + 8] = torch.rand(8, 8) + 0.1
    assert data(seen(nn.BatchNorm2d(1).eval(), [x] * 4)).padding is None


def test_saturation_is_seen_in_functions_and_not_in_the_answer() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.out = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
            nn.init.constant_(self.norm.weight, 5.0)
            nn.init.constant_(self.out.weight, 50.0)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.out(torch.tanh(self.norm(x))))

    x = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    evidence = seen(Gated().eval(), [x])
    z = 5 * (x - x.mean(0)) / x.std(0, correction=0)
    expected = float((1 - torch.tanh(z) ** 2 < 0.05).float().mean())
    found = data(evidence).saturation
    assert found is not None
    assert (found.function, round(found.share, 3)) == ("tanh", round(expected, 3))
    assert data(evidence, 1).saturation is None


def test_gradients_are_autograds_of_the_loss_in_training() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
    )
    batch = (torch.randn(32, 4), torch.randint(3, (32,)))
    found = seen(model.eval(), [batch], loss=F.cross_entropy).data
    assert found is not None
    model.train()
    grads = torch.autograd.grad(
        F.cross_entropy(model(batch[0]), batch[1]), [model[0].weight, model[3].weight]
    )
    for entry, grad, index in zip(found.gradients, grads, (0, 3), strict=True):
        expected = float(grad.norm() * model[index].weight.detach().norm())
        assert (entry.layer, entry.size) == (str(index), pytest.approx(expected, rel=1e-4))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_loss_and_outputs_in_all_three_ways() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(2)).eval()
    model[0].running_mean.fill_(1.0)
    batches = [torch.randn(64, 2) for _ in range(4)]
    found = seen(model, batches, loss=lambda output, batch: output.square().mean()).data
    assert found is not None
    assert found.loss is not None
    x = torch.cat(batches)
    expected = [float(((b - 1) ** 2).mean()) for b in batches]
    np.testing.assert_allclose(found.loss.inference, expected, rtol=1e-4)
    np.testing.assert_allclose(found.loss.training, np.ones(4), rtol=1e-4)
    fitted = [float((((b - x.mean(0)) / x.std(0)) ** 2).mean()) for b in batches]
    np.testing.assert_allclose(found.loss.calibrated, fitted, rtol=1e-4)


def test_a_model_that_returns_its_loss_needs_none() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.norm(x)
            return {"loss": y.square().mean(), "logits": y}

    found = seen(Own().eval(), [dict(x=torch.ones(4, 2))]).data
    assert found is not None
    assert found.loss is not None
    assert found.loss.inference == pytest.approx([1.0], rel=1e-4)


def test_statistics_at_batch_2_are_measured_layer_by_layer() -> None:
    """By batches of 2 the second layer would see nothing but the first one's ±1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    batches = [torch.randn(2, 3) for _ in range(128)]
    second = data(seen(model, batches), 1)
    x = torch.cat(batches).double()
    first = ((x - x.mean(0)) / (x.var(0) + 1e-5).sqrt()).relu()
    z = first @ model[2].weight.double().T + model[2].bias.double()
    np.testing.assert_allclose(second.mean, z.mean(0).detach(), atol=1e-5)
    np.testing.assert_allclose(second.var, z.var(0).detach(), rtol=1e-4)


def test_layers_are_in_the_order_of_calls() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Any:
            return self.last(self.first(x))

    evidence = seen(Backwards().eval(), [torch.randn(8, 2)])
    found = {layer.name: layer.data.order for layer in evidence.layers if layer.data is not None}
    assert found == {"first": 0, "last": 1}


def test_the_last_batch_of_a_loader() -> None:
    def last(count: int, **given: Any) -> int | None:
        loader = DataLoader(TensorDataset(torch.randn(count, 2)), batch_size=8, **given)
        found = seen(nn.BatchNorm1d(2).eval(), loader).data
        return None if found is None else found.last_batch

    assert [last(17), last(16), last(17, drop_last=True)] == [1, 8, None]
    # An epoch is what the sampler gives, not the dataset.
    assert [last(17, sampler=range(16)), last(16, sampler=range(9))] == [8, 1]


def test_a_generator_is_read_once_and_no_further_than_needed() -> None:
    taken = []

    def stream() -> Iterator[Tensor]:
        for index in range(1000):
            taken.append(index)
            yield torch.randn(64, 2)

    found = seen(nn.BatchNorm1d(2).eval(), stream()).data
    assert found is not None
    assert (found.batches, len(taken)) == (32, 32)
    found = seen(nn.BatchNorm1d(2).eval(), (torch.randn(64, 2) for _ in range(9)), max_batches=3)
    assert found.data is not None
    assert found.data.batches == 3


def test_nonfinite_batches_are_left_out() -> None:
    good = [torch.randn(16, 2) for _ in range(4)]
    bad = good[0].clone()
    bad[0, 0] = torch.inf
    layer = data(seen(nn.BatchNorm1d(2).eval(), [*good, bad]))
    np.testing.assert_allclose(layer.mean, torch.cat(good).double().mean(0), atol=1e-6)
    assert layer.nonfinite == 1


def test_a_loss_that_is_no_number_is_refused() -> None:
    with pytest.raises(TypeError, match="must return one number as a tensor; got float"):
        sn.diagnose(nn.BatchNorm1d(2), [torch.randn(4, 2)], loss=lambda output, batch: 1.0)


def test_empty_and_single_batches_are_refused() -> None:
    model, some = nn.BatchNorm1d(2), [torch.randn(4, 2)]
    with pytest.raises(ValueError, match="`against` must hold at least one batch; got none"):
        sn.diagnose(model, some, against=[])
    with pytest.raises(TypeError, match="`batches` must be an iterable of batches"):
        sn.diagnose(model, some, against=some[0])


# --- nothing is changed


def awkward_batches() -> list[Tensor]:
    return [torch.randn(size, 4, generator=torch.Generator().manual_seed(size)) for size in (6, 2)]


def test_nothing_is_changed() -> None:
    network = awkward()
    batches = awkward_batches()
    before = picture(network)
    sn.diagnose(network, batches, loss=lambda output, batch: output.sum(), against=batches)
    assert picture(network) == before


@pytest.mark.parametrize("call", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_changed_by_an_exception(call: int, error: type[BaseException]) -> None:
    network = awkward()
    calls = 0

    def forward(model: nn.Module, batch: Tensor) -> Any:
        nonlocal calls
        calls += 1
        result = model(batch)
        if calls == call + 3:  # the graph of calls comes first
            raise error("broken")
        return result

    before = picture(network)
    with pytest.raises(error):
        sn.diagnose(network, awkward_batches(), forward=forward)
    assert picture(network) == before


def test_random_state_and_gradients_stay() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout())
    network(torch.randn(8, 2)).square().sum().backward()
    grads = [
        parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None
    ]
    before = picture(network)["random"]
    sn.diagnose(network, [torch.ones(8, 2)] * 2)
    assert picture(network)["random"] == before
    for parameter, grad in zip(network.parameters(), grads, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, grad)


def test_the_gradient_of_what_layers_get_is_all_that_comes_back() -> None:
    """|∂L/∂x|·|x| by hand: of a residual path the branch and the path together."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
            self.branch, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.first(x)).sigmoid()
            out: Tensor = self.last(x + self.branch(x))
            return out

    torch.manual_seed(0)
    model, x, labels = Residual().eval(), torch.randn(16, 4), torch.randint(3, (16,))
    evidence = seen(model, [(x, labels)], loss=F.cross_entropy)
    assert evidence.data is not None
    first, branch, last = evidence.data.gradients
    assert [g.layer for g in (first, branch, last)] == ["first", "branch", "last"]
    assert first.of_input is None  # data take no gradient

    wide = model.double().requires_grad_(False)
    z = x.double() @ wide.first.weight.T + wide.first.bias
    z = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()).sigmoid().detach()
    mixed = z + z @ wide.branch.weight.T + wide.branch.bias
    logits = mixed @ wide.last.weight.T + wide.last.bias
    of_mixed = (logits.softmax(1) - F.one_hot(labels, 3)) / 16 @ wide.last.weight
    of_z = of_mixed + of_mixed @ wide.branch.weight
    assert last.of_input == pytest.approx(float(of_mixed.norm() * mixed.norm()), rel=1e-4)
    assert branch.of_input == pytest.approx(float(of_z.norm() * z.norm()), rel=1e-4)

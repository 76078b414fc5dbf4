"""Calibrated statistics are those of all data at once, in float64, whatever the split."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import steadynorm as sn

TOLERANCE = 1e-5  # of the larger of the value and 1: float32 inputs, float32 buffers


def close(actual: Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(
        actual.double().numpy(), expected, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=False
    )


def statistics(x: np.ndarray, *, unbiased: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance per channel of (N, C, *) in float64."""
    flat = np.moveaxis(x.astype(np.float64), 1, 0).reshape(x.shape[1], -1)
    return flat.mean(1), flat.var(1, ddof=1 if unbiased and flat.shape[1] > 1 else 0)


def splits(total: int) -> st.SearchStrategy[list[int]]:
    """Batch sizes that sum to `total`."""
    cuts = st.sets(st.integers(1, total - 1), max_size=total - 1).map(sorted)
    return cuts.map(lambda at: list(np.diff([0, *at, total])))


def network(norm: type[nn.Module], **options: object) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(5, 7, bias=False), norm(7, **options), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(7, 6), norm(6, **options), nn.Tanh(),
        nn.Linear(6, 4), norm(4, **options),
    )  # fmt: skip


def population(
    model: nn.Sequential, x: np.ndarray, *, unbiased: bool
) -> list[tuple[np.ndarray, ...]]:
    """What each batch norm should keep, one pass in float64 over everything at once."""
    x, kept = x.astype(np.float64), []
    for layer in model:
        if isinstance(layer, nn.Linear):
            x = x @ layer.weight.detach().double().numpy().T
            x = x if layer.bias is None else x + layer.bias.detach().double().numpy()
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            mean, var = statistics(x, unbiased=unbiased)
            kept.append((mean, var))
            x = (x - mean) / np.sqrt(var + layer.eps)
        elif isinstance(layer, nn.ReLU):
            x = np.maximum(x, 0)
        elif isinstance(layer, nn.Tanh):
            x = np.tanh(x)
    return kept


def norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def data(samples: int, features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-2, 2, features)
    return torch.randn(samples, features, generator=generator) * scale + 3 * scale


@settings(max_examples=40, deadline=None)
@given(sizes=splits(23), mean=st.sampled_from([0.0, -7.0, 1e3]), seed=st.integers(0, 99))
@pytest.mark.parametrize("passes", ["one", "layerwise"])
def test_the_first_layer_is_exact_for_any_split(
    passes: str, sizes: list[int], mean: float, seed: int
) -> None:
    x = torch.randn(23, 3, 4, 2, generator=torch.Generator().manual_seed(seed)) + mean
    model = nn.Sequential(sn.BatchNorm2d(3), nn.Flatten(), nn.Linear(24, 2), sn.BatchNorm1d(2))
    sn.calibrate(model, list(x.split(sizes)), passes=passes, progress=False)
    for kept, expected in zip(
        (model[0].running_mean, model[0].running_var), statistics(x.numpy()), strict=True
    ):
        close(kept, expected)


@settings(max_examples=30, deadline=None)
@given(sizes=splits(19), seed=st.integers(0, 99))
@pytest.mark.parametrize(
    ("norm", "options", "unbiased"),
    [
        (nn.BatchNorm1d, {}, True),
        (sn.BatchNorm1d, {}, True),
        (sn.BatchNorm1d, {"statistics": "steady"}, False),
        (sn.BatchNorm1d, {"statistics": "running"}, False),
        (sn.BatchNorm1d, {"statistics": "renorm"}, True),
        (sn.BatchNorm1d, {"statistics": sn.Ghost(4)}, True),
    ],
)
def test_layerwise_every_layer_is_exact_for_any_split(
    norm: type[nn.Module], options: dict, unbiased: bool, sizes: list[int], seed: int
) -> None:
    model = network(norm, **options)
    x = data(19, 5, seed)
    sn.calibrate(model, list(x.split(sizes)), passes="layerwise", progress=False)
    expected = population(model, x.numpy(), unbiased=unbiased)
    for layer, (mean, var) in zip(norms(model), expected, strict=True):
        close(layer.running_mean, mean)
        close(layer.running_var, var)


def test_one_pass_depends_on_the_split_after_the_first_layer() -> None:
    """What the documentation warns of, so that the tests above mean something."""
    x = data(24, 5)
    kept = []
    for size in (2, 24):
        model = network(sn.BatchNorm1d)
        sn.calibrate(model, x.split(size), progress=False)
        kept.append(norms(model))
    first, last = (
        [(a.running_var / b.running_var - 1).abs().max() for a, b in zip(*kept, strict=False)]
    )[::2]
    assert first < TOLERANCE < 0.05 < last


def test_one_pass_normalizes_by_each_batchs_biased_statistics_with_dropout_off() -> None:
    x = data(8, 5)
    model = network(nn.BatchNorm1d)
    sn.calibrate(model, x.split(4), progress=False)
    middle = []
    for batch in x.split(4):
        h = batch.double().numpy() @ model[0].weight.detach().double().numpy().T
        h = np.maximum((h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5), 0)
        middle.append(
            h @ model[4].weight.detach().double().numpy().T + model[4].bias.detach().numpy()
        )
    mean, var = statistics(np.concatenate(middle))
    close(model[5].running_mean, mean)
    close(model[5].running_var, var)


@settings(max_examples=25, deadline=None)
@given(valid=st.lists(st.booleans(), min_size=24, max_size=24), cut=st.integers(1, 3))
def test_only_valid_positions_count(valid: list[bool], cut: int) -> None:
    x, mask = data(24, 3).view(4, 6, 3).mT.contiguous(), torch.tensor(valid).view(4, 6)
    batches = [(x[:cut], mask[:cut]), (x[cut:], mask[cut:])]
    layer = sn.BatchNorm1d(3)
    before = layer.running_var.clone()
    report = sn.calibrate(
        layer, batches, forward=lambda m, b: m(b[0], mask=b[1]), progress=False
    ).layers[0]
    assert report.values == sum(valid)
    chosen = x.movedim(1, -1)[mask].numpy()
    if not any(valid):
        assert report.status == "left"
        assert torch.equal(layer.running_var, before)
        return
    mean, var = statistics(chosen)
    close(layer.running_mean, mean)
    close(layer.running_var, var)


class Twice(nn.Module):
    """One batch norm under two names, called on different things."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = sn.BatchNorm1d(3)
        self.alias = self.norm

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.norm(x) + self.alias(y)


def test_calls_of_a_shared_layer_are_pooled() -> None:
    x, y = data(6, 3, 1), data(6, 3, 2) * 4
    model = Twice()
    report = sn.calibrate(model, [{"x": x[:2], "y": y[:2]}, {"x": x[2:], "y": y[2:]}])
    mean, var = statistics(torch.cat([x, y]).numpy())
    close(model.norm.running_mean, mean)
    close(model.norm.running_var, var)
    assert [layer.name for layer in report.layers] == ["norm"]
    assert report.layers[0].values == 12
    assert model.norm.num_batches_tracked == 4


class Recurrent(nn.Module):
    """Feeds its batch norm with what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(3 * self.norm(x) + 1)


@pytest.mark.parametrize("passes", ["one", "layerwise"])
def test_a_layer_that_feeds_itself_normalizes_by_the_batch_meanwhile(passes: str) -> None:
    x = data(10, 2)
    model = Recurrent()
    sn.calibrate(model, [x], passes=passes, progress=False)
    first = x.double().numpy()
    second = 3 * (first - first.mean(0)) / np.sqrt(first.var(0) + 1e-5) + 1
    mean, var = statistics(np.concatenate([first, second]))
    close(model.norm.running_mean, mean)
    close(model.norm.running_var, var)


def test_batches_of_one_image_without_positions_work() -> None:
    x = data(5, 3)
    layer = nn.BatchNorm1d(3)
    sn.calibrate(layer, list(x.split(1)), progress=False)
    close(layer.running_var, statistics(x.numpy())[1])


def test_one_value_in_all_keeps_its_zero_variance() -> None:
    layer = nn.BatchNorm1d(2)
    sn.calibrate(layer, [torch.tensor([[4.0, 5.0]])], progress=False)
    assert layer.running_mean.tolist() == [4.0, 5.0]
    assert layer.running_var.tolist() == [0.0, 0.0]


def test_a_large_mean_keeps_the_variance() -> None:
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)) * 0.1 + 1e4
    layer = nn.BatchNorm1d(2)
    sn.calibrate(layer, x.split(7), progress=False)
    np.testing.assert_allclose(layer.running_var.numpy(), statistics(x.numpy())[1], rtol=1e-5)


def test_poisoned_statistics_are_repaired() -> None:
    x = data(9, 2)
    layer = nn.BatchNorm1d(2)
    layer.running_mean.fill_(torch.inf)
    layer.running_var.fill_(torch.nan)
    report = sn.calibrate(layer, x.split(3), progress=False)
    close(layer.running_mean, statistics(x.numpy())[0])
    close(layer.running_var, statistics(x.numpy())[1])
    assert report.to_dict()["layers"][0]["std_ratio"] is None


def test_a_nonfinite_batch_is_refused_or_left_out() -> None:
    good, bad = data(6, 2), torch.tensor([[1.0, torch.nan], [2.0, 3.0]])
    layer = sn.BatchNorm1d(2)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(ValueError) as refusal:
        sn.calibrate(nn.Sequential(layer), [good, bad], progress=False)
    assert str(refusal.value) == (
        "calibrate: the input of '0' must be finite; got NaN or infinity in some batch. Leave such "
        "batches out, or give our layers nonfinite='skip'."
    )
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    skipping = sn.BatchNorm1d(2, nonfinite="skip")
    sn.calibrate(skipping, [good[:3], bad, good[3:]], progress=False)
    close(skipping.running_mean, statistics(good.numpy())[0])
    close(skipping.running_var, statistics(good.numpy())[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_statistics_keep_their_buffers_type(dtype: torch.dtype) -> None:
    x = data(40, 3).to(dtype)
    layer = sn.BatchNorm1d(3).to(dtype)
    sn.calibrate(layer, x.split(8), progress=False)
    mean, var = statistics(x.double().numpy())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.running_mean.dtype == layer.running_var.dtype == wide
    close(layer.running_mean, mean)
    close(layer.running_var, var)


@pytest.mark.parametrize("passes", ["one", "layerwise"])
def test_statistics_beyond_float16_are_refused(passes: str) -> None:
    """torch's layer in half precision; its running variance would be infinite, and say nothing."""
    model = nn.Sequential(nn.BatchNorm1d(1)).half()
    batches = [torch.tensor([[-1000.0], [1000.0]]).half()]
    with pytest.raises(ValueError, match=r"of '0' are float16, which cannot hold .* sn.convert"):
        sn.calibrate(model, batches, passes=passes)
    assert model[0].running_var.item() == 1
    model, _ = sn.convert(model)
    sn.calibrate(model, batches, passes=passes)
    assert model[0].running_var.item() == 2e6


def test_update_bn_gives_something_else() -> None:
    """The peer weighs batches alike and forgets the spread between their means."""
    x = data(6, 2)
    batches = [x[:4], x[4:]]
    ours, theirs = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    sn.calibrate(ours, batches, progress=False)
    torch.optim.swa_utils.update_bn(batches, nn.Sequential(theirs))
    close(ours.running_var, statistics(x.numpy())[1])
    assert ((theirs.running_var - ours.running_var).abs() / ours.running_var).max() > 0.05


@pytest.mark.parametrize(("batches_before", "after"), [(0, 3), (2, 3), (500, 500)])
def test_the_counter_is_raised_never_lowered(batches_before: int, after: int) -> None:
    layer = sn.BatchNorm1d(2, statistics="steady")
    layer.num_batches_tracked.fill_(batches_before)
    sn.calibrate(layer, data(9, 2).split(3), progress=False)
    assert layer.num_batches_tracked == after


def test_what_matters_is_the_layers_own_input() -> None:
    """A hook that changes the input has run before it is measured."""
    x = data(6, 2)
    layer = nn.BatchNorm1d(2)
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    sn.calibrate(layer, [x], progress=False)
    close(layer.running_mean, 2 * statistics(x.numpy())[0])


def test_a_compiled_model_is_measured_too() -> None:
    x = data(6, 5)
    model = network(nn.BatchNorm1d)
    model.compile(backend="eager")
    with torch.no_grad():
        model.eval()(x)
    sn.calibrate(torch.compile(model, backend="eager"), [x], passes="layerwise", progress=False)
    for layer, (mean, var) in zip(
        norms(model), population(model, x.numpy(), unbiased=True), strict=True
    ):
        close(layer.running_mean, mean)
        close(layer.running_var, var)

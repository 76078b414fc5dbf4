"""Ours in place of torch's: on PyTorch's own sample inputs, and in whole networks."""

import copy
import inspect
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests import tolerances
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import steadynorm as sn

pytestmark = pytest.mark.usefixtures("route")

LAYERS = {
    nn.BatchNorm1d: sn.BatchNorm1d,
    nn.BatchNorm2d: sn.BatchNorm2d,
    nn.BatchNorm3d: sn.BatchNorm3d,
}
LAZY = {
    nn.BatchNorm1d: (nn.LazyBatchNorm1d, sn.LazyBatchNorm1d),
    nn.BatchNorm2d: (nn.LazyBatchNorm2d, sn.LazyBatchNorm2d),
    nn.BatchNorm3d: (nn.LazyBatchNorm3d, sn.LazyBatchNorm3d),
}
OPERATORS = [op for op in op_db if op.name == "nn.functional.batch_norm"]
MODULES = [info for info in module_db if info.module_cls in LAYERS]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def fresh(value: Any) -> Any:
    """A copy with a gradient of its own."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def gradients(y: Tensor, tensors: list[Any]) -> list[Tensor | None]:
    leaves = [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]
    if not y.requires_grad or not leaves:
        return []
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
    return list(torch.autograd.grad(y, leaves, grad, allow_unused=True))


def assert_agree(ours: Any, theirs: Any, said: str = "") -> None:
    """Equal to PyTorch's own tolerance; in half, to that of the largest value, which ours is in."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs), said
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), said
        for one, other in zip(ours, theirs, strict=True):
            assert_agree(one, other, said)
    elif isinstance(theirs, Tensor) and theirs.dtype in (torch.bfloat16, torch.float16):
        assert ours.dtype is theirs.dtype
        limit = tolerances.TABLE[theirs.dtype, "backward"].limit
        assert tolerances.error(ours, theirs.detach().double()) <= limit, said
    else:
        assert_close(ours, theirs, msg=lambda text: f"{said}: {text}")


def refusal(call: Any) -> type | None:
    """The type of error that a call raises."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - the kind of error is what is compared
        return type(error)
    return None


# torch.nn.functional.batch_norm -----------------------------------------------------------------


def test_torch_still_keeps_samples() -> None:
    """So that the tests below cannot pass by having nothing to run."""
    assert len(OPERATORS) == 2
    assert len(MODULES) == 3
    assert len(list(OPERATORS[0].sample_inputs("cpu", torch.float32))) >= 12
    for info in MODULES:
        assert len(module_inputs(info, torch.float32, training=True)) >= 7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.formatted_name)
def test_operator_samples(op: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        said = f"{tuple(sample.input.shape)} {sample.kwargs}"

        def run(function: Any, sample: Any = sample) -> Any:
            tensors = [fresh(t) for t in (sample.input, *sample.args)]
            y = function(*tensors, **sample.kwargs)
            return y, gradients(y, tensors), tensors[1:3]

        assert_agree(run(sn.functional.batch_norm), run(F.batch_norm), said)


# torch.nn.BatchNorm1d, 2d, 3d and lazy ------------------------------------------------------------


def module_inputs(info: Any, dtype: torch.dtype, *, training: bool) -> list[Any]:
    return list(info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=training))


def copied(source: nn.Module, target: nn.Module) -> nn.Module:
    """`target` with the training mode and the state, scrambled, of `source`."""
    generator = torch.Generator().manual_seed(1)
    state = {
        key: torch.rand(value.shape, generator=generator).to(value.dtype) + 0.5
        if value.is_floating_point()
        else value
        for key, value in source.state_dict().items()
    }
    source.load_state_dict(state)
    target.load_state_dict(state)
    return target.train(source.training)


def assert_same_steps(ours: nn.Module, theirs: nn.Module, input: Tensor) -> None:
    """Two training steps and an inference: outputs, gradients, buffers."""
    for training in (True, True, False):
        ours.train(training)
        theirs.train(training)
        results = []
        for layer in (ours, theirs):
            x = fresh(input)
            y = layer(x)
            results.append((y, gradients(y, [x, *layer.parameters()])))
        assert_agree(*results)
        if input.numel():
            assert_agree(dict(ours.named_buffers()), dict(theirs.named_buffers()))


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.name)
def test_module_samples(info: Any, dtype: torch.dtype, lazy: bool) -> None:
    torch.manual_seed(0)
    for sample in module_inputs(info, dtype, training=True):
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        (x,) = sample.forward_input.args
        kinds = LAZY[info.module_cls] if lazy else (info.module_cls, LAYERS[info.module_cls])
        if lazy:
            args = args[1:]
        theirs, ours = (kind(*args, **kwargs).to(dtype) for kind in kinds)
        if lazy:
            assert type(ours) is kinds[1]
            ours(x)
            theirs(x)
            assert type(ours) is LAYERS[info.module_cls]
        assert_same_steps(copied(theirs, ours), theirs, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.name)
def test_module_samples_in_half(info: Any, dtype: torch.dtype) -> None:
    """float32 layers take half input; so do they in torch, and answer in the input's type."""
    torch.manual_seed(0)
    for sample in module_inputs(info, torch.float32, training=True):
        made = sample.constructor_input
        (x,) = sample.forward_input.args
        theirs = info.module_cls(*made.args, **made.kwargs)
        ours = LAYERS[info.module_cls](*made.args, **made.kwargs)
        assert_same_steps(copied(theirs, ours), theirs, x.detach().to(dtype).requires_grad_())


def error_samples() -> Iterator[Any]:
    for info in MODULES:
        made = info.module_error_inputs_func(
            info, "cpu", torch.float32, requires_grad=False, training=True
        )
        for number, sample in enumerate(made):
            yield pytest.param(info.module_cls, sample, id=f"{info.name}-{number}")


@pytest.mark.parametrize(("kind", "sample"), list(error_samples()))
def test_module_errors(kind: type[nn.Module], sample: Any) -> None:
    made = sample.module_error_input.constructor_input
    (x, *_) = sample.module_error_input.forward_input.args
    with pytest.raises(sample.error_type):
        kind(*made.args, **made.kwargs)(x)
    if made.kwargs.get("eps", 0) < 0 or (len(made.args) > 1 and made.args[1] < 0):
        with pytest.raises(sample.error_type):  # ours refuses what can never work when it is made
            LAYERS[kind](*made.args, **made.kwargs)
        return
    ours = LAYERS[kind](*made.args, **made.kwargs)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(sample.error_type):
        ours(x)
    assert_close(dict(ours.state_dict()), dict(before))


@pytest.mark.parametrize(
    ("layer", "input"),
    [
        (1, torch.ones(1, 3)),  # one value per channel
        (1, torch.ones(1, 3, 1)),
        (1, torch.ones(3)),  # no channel axis
        (1, torch.ones(4, 3, 2, 2)),
        (1, torch.ones(4, 5)),  # channels
        (2, torch.ones(4, 3)),
        (2, torch.ones(4, 4, 2, 2)),
        (2, torch.ones(1, 3, 1, 1)),
        (3, torch.ones(4, 3, 2, 2)),
        (1, torch.ones(4, 3, dtype=torch.float64)),  # types
        (1, torch.ones(4, 3, dtype=torch.int64)),
    ],
    ids=lambda value: f"{value.dtype}-{tuple(value.shape)}" if isinstance(value, Tensor) else None,
)
def test_what_torch_refuses_we_refuse(layer: int, input: Tensor) -> None:
    theirs, ours = list(LAYERS.items())[layer - 1]
    kind = refusal(lambda: theirs(3)(input))
    assert kind is not None
    # RuntimeError stands for its subclass too; a wrong number of channels is a ValueError.
    kinds = (RuntimeError, ValueError) if issubclass(kind, RuntimeError) else kind
    made = ours(3)
    with pytest.raises(kinds):
        made(input)
    assert int(made.num_batches_tracked) == 0


# The object ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
def test_a_subclass_with_the_same_defaults(kind: type[nn.Module]) -> None:
    ours, theirs = LAYERS[kind](5), kind(5)
    assert isinstance(ours, kind)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    wanted = inspect.signature(kind.__init__).parameters
    found = inspect.signature(LAYERS[kind].__init__).parameters
    assert list(found)[: len(wanted)] == list(wanted)
    for name, parameter in wanted.items():
        assert found[name].default == parameter.default, name
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats", "training"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_lazy_subclass(kind: type[nn.Module]) -> None:
    theirs, ours = LAZY[kind]
    assert issubclass(ours, theirs)
    assert issubclass(ours, LAYERS[kind])
    assert ours.cls_to_become is LAYERS[kind]
    layer = ours(statistics=sn.Steady(prior=7), activation="relu", bias=False, eps=0.5)
    layer(torch.randn(4, 6, *(3,) * (int(kind.__name__[-2]))))
    assert type(layer) is LAYERS[kind]
    settings = vars(layer)
    assert (settings["num_features"], settings["eps"], layer.bias) == (6, 0.5, None)
    assert (layer.statistics, layer.activation) == (sn.Steady(prior=7), "relu")


def trained(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = sn.BatchNorm1d(4, statistics=sn.Steady(prior=5), activation="silu", **settings)
    layer(torch.randn(8, 4) * 3 + 2)
    return layer


def pickled(layer: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(layer))


def saved(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    again = sn.BatchNorm1d(4, statistics=sn.Steady(prior=5), activation="silu")
    again.to(layer.weight.dtype).load_state_dict(torch.load(file, weights_only=True))
    return again


@pytest.mark.parametrize("copy_of", [copy.deepcopy, copy.copy, pickled, saved])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_round_trips(copy_of: Any, dtype: torch.dtype) -> None:
    layer = trained().to(dtype)
    again = copy_of(layer)
    assert (again.statistics, again.activation) == (layer.statistics, "silu")
    assert_close(dict(again.state_dict()), dict(layer.state_dict()), rtol=0, atol=0)
    x = torch.randn(6, 4, dtype=dtype)
    assert_close(again.eval()(x), layer.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to"])
def test_half_casts_keep_float32_statistics(cast: str) -> None:
    layer = trained()
    before = layer.running_mean.clone(), layer.running_var.clone()
    layer = layer.to(torch.float16) if cast == "to" else getattr(layer, cast)()
    assert layer.weight.dtype in (torch.float16, torch.bfloat16)
    assert_close((layer.running_mean, layer.running_var), before, rtol=0, atol=0)
    layer.float()
    assert_close((layer.running_mean, layer.running_var), before, rtol=0, atol=0)
    layer.double()
    assert layer.running_mean.dtype is torch.float64


def test_half_from_the_start_keeps_float32_statistics() -> None:
    layer = sn.BatchNorm2d(3, dtype=torch.bfloat16)
    assert layer.weight.dtype is torch.bfloat16
    assert layer.running_mean.dtype is layer.running_var.dtype is torch.float32
    lazy = sn.LazyBatchNorm2d(dtype=torch.float16)
    lazy(torch.randn(2, 3, 4, 4, dtype=torch.float16))
    assert lazy.running_var.dtype is torch.float32


def test_a_half_checkpoint_of_torch_loads() -> None:
    theirs = nn.BatchNorm1d(4).half()
    theirs.running_mean.fill_(1.5)
    ours = sn.BatchNorm1d(4).half()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours.running_mean.tolist() == [1.5] * 4
    assert ours.running_mean.dtype is torch.float32
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_meta_device_and_to_empty() -> None:
    layer = sn.BatchNorm2d(3, device="meta", statistics="steady")
    assert layer.running_mean.is_meta
    layer.to_empty(device="cpu").reset_parameters()
    assert_close(dict(layer.state_dict()), dict(nn.BatchNorm2d(3).state_dict()))


# Whole networks -------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, norm: Any, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = norm(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = norm(out)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), norm(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        kept = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + kept)


def resnet(norm: Any) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1, bias=False),
        norm(8),
        nn.ReLU(),
        Block(norm, 8, 8, 1),
        Block(norm, 8, 16, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def huggingface_resnet(norm: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=10
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn, "BatchNorm2d", norm)
        model = transformers.ResNetForImageClassification(config)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(pixel_values=x).logits

    return Logits()


@pytest.mark.parametrize("network", [resnet, huggingface_resnet])
def test_a_resnet_loads_both_ways_and_trains_alike(network: Any) -> None:
    torch.manual_seed(0)
    theirs, ours = network(nn.BatchNorm2d), network(sn.BatchNorm2d)
    layers = [m for m in ours.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(layers) >= 5
    assert {type(m) for m in layers} == {sn.BatchNorm2d}
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    # float64, so that the chaos of training does not blow up what rounding makes of a difference
    ours.double()
    theirs.double()
    assert_same_steps(ours, theirs, torch.randn(4, 3, 32, 32, dtype=torch.float64))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (ours, theirs)]
    for _ in range(3):
        x, labels = torch.randn(4, 3, 32, 32).double(), torch.randint(10, (4,))
        for model, optimizer in zip((ours.train(), theirs.train()), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
    assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32).double()
    assert_close(ours.eval()(x), theirs.eval()(x))


def test_a_layer_pickled_without_its_prepared_settings_has_them_again():
    """As by an earlier version of the package."""
    layer = sn.BatchNorm1d(3, eps=0.5, statistics="steady")
    state = {name: value for name, value in vars(layer).items() if name != "_settings"}
    again = sn.BatchNorm1d.__new__(sn.BatchNorm1d)
    again.__setstate__(copy.deepcopy(state))
    x = torch.randn(8, 3)
    assert torch.equal(again(x), layer(x))
    assert again._settings == layer._settings

"""`untouched`: everything is put back, also after exceptions, also what was rebound or added."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import steadynorm as sn
from steadynorm.models.untouched import seed, untouched


class Restless(nn.Module):
    """Rebinds a buffer, writes into another, adds a third, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("noise", torch.tensor([0.0, float("nan")]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        self.noise.normal_()
        if not hasattr(self, "added"):
            self.register_buffer("added", torch.ones(1))
        return x + random.random() + np.random.rand()  # noqa: NPY002  what loaders use


def model() -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(), Restless(), sn.BatchNorm1d(5)
    )
    network[0].weight.requires_grad_(False)
    network[0].bias.grad = torch.ones(5)
    network[1].register_forward_pre_hook(lambda module, args: None)
    network[2].eval()
    return network


def picture(network: nn.Module) -> dict[str, Any]:
    """Everything that could have changed, in a form that compares exactly."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    grads = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    return {
        "values": {name: t.detach().numpy().tobytes() for name, t in (tensors | grads).items()},
        "identity": {name: id(tensor) for name, tensor in tensors.items()},
        "gradients": {name: id(grad) for name, grad in grads.items()},
        "needed": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "modes": [module.training for module in network.modules()],
        "hooks": [
            {name: list(held) for name, held in vars(module).items() if name.endswith("hooks")}
            for module in network.modules()
        ],
        "random": random_states(),
    }


def random_states() -> tuple[Any, ...]:
    numpy = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), numpy[1].tobytes(), numpy[2]  # type: ignore[index, call-overload]


def disturb(network: nn.Sequential) -> None:
    network.train()
    network[0].weight.requires_grad_(True)
    network[1].register_forward_hook(lambda *args: None)
    network[4].register_full_backward_hook(lambda *args: None)
    network[1]._forward_pre_hooks.clear()
    network(torch.randn(8, 4)).sum().backward()


def test_everything_is_restored() -> None:
    network = model()
    before = picture(network)
    with untouched(network):
        disturb(network)
        assert all(picture(network)[key] != before[key] for key in before)
    assert picture(network) == before


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_restores(error: BaseException) -> None:
    network = model()
    before = picture(network)

    def fail() -> None:
        with untouched(network):
            disturb(network)
            raise error

    with pytest.raises(type(error)):
        fail()
    assert picture(network) == before


def test_handles_of_earlier_hooks_still_remove_them() -> None:
    network = model()
    handle = network[4].register_forward_hook(lambda *args: None)
    with untouched(network):
        disturb(network)
    handle.remove()
    assert not network[4]._forward_hooks


class HooksInFirstCall(nn.Module):
    """As transformers' models: hooks that capture outputs are added once, and a flag says so."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.BatchNorm1d(4)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not getattr(self, "hooks_installed", False):
            self.inner.register_forward_hook(lambda module, args, output: self.seen.append(output))
            self.hooks_installed = True
        self.seen.clear()
        self.inner(x)
        return self.seen[-1]


@pytest.mark.parametrize("call", [sn.convert, sn.fold, sn.drop_redundant_bias])
def test_hooks_that_a_first_call_adds_are_added_again(call: Callable[..., Any]) -> None:
    network, x = HooksInFirstCall().eval(), torch.randn(3, 4)
    result, _ = call(network, example_inputs=x)
    torch.testing.assert_close(result(x), network(x))


def test_accepted_buffers_keep_their_values() -> None:
    network = model()
    mean = network[1].running_mean
    with untouched(network) as original:
        network(torch.randn(8, 4))
        original.restore()
        assert torch.equal(mean, torch.zeros(5))
        mean.fill_(3)
        network[4].running_mean.fill_(3)
        original.accept_buffers([mean])
        mean.fill_(4)
    assert network[1].running_mean is mean
    assert torch.equal(mean, torch.full((5,), 3.0))
    assert torch.equal(network[4].running_mean, torch.zeros(5))


def test_random_states_can_be_rewound_inside() -> None:
    with untouched(nn.Identity()) as original:
        first = torch.rand(2), random.random(), np.random.rand()  # noqa: NPY002
        original.restore_random()
        again = torch.rand(2), random.random(), np.random.rand()  # noqa: NPY002
    assert torch.equal(first[0], again[0])
    assert first[1:] == again[1:]


def test_seeding_is_the_usual_one_and_undone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    before = random_states()
    with untouched(nn.Identity()):
        seed(0)
        assert torch.equal(torch.rand(3), expected)
    assert random_states() == before


def test_a_backward_that_saved_a_buffer_still_runs() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
    output = network(torch.randn(4, 2)).sum()
    with untouched(network):
        network(torch.randn(4, 2))
    output.backward()


def test_lazy_layers_are_left_lazy() -> None:
    network = nn.Sequential(nn.LazyBatchNorm1d())
    with untouched(network):
        network.eval()
    assert network[0].training
    assert network[0].has_uninitialized_params()


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: sn.convert(m, example_inputs=x),
        lambda m, x: sn.convert(m),
        lambda m, x: sn.fold(m.eval(), x),
        lambda m, x: sn.fold(m.eval()),
        sn.drop_redundant_bias,
        lambda m, x: sn.calibrate(m, [x], progress=False),
        lambda m, x: sn.adapt(m, [x], progress=False),
        lambda m, x: sn.diagnose(m, [x]),
    ],
    ids=["convert by a run", "convert", "fold by a run", "fold", "bias", "calibrate", "adapt",
         "diagnose"],
)  # fmt: skip
def test_random_states_are_as_before(call: Callable[[nn.Module, Tensor], Any]) -> None:
    network = model()
    del network[3]
    x = torch.randn(8, 4)
    before = random_states()
    call(network, x)
    assert random_states() == before


class Growing(nn.Module):
    """Gives a buffer another shape, as the observers of quantization do on their first input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        self.largest.resize_(x.shape[1]).copy_(x.amax(0))
        return x


def test_a_buffer_that_grows_is_put_back() -> None:
    network = Growing()
    held = network.largest
    with untouched(network):
        network(torch.randn(3, 4))
        assert network.largest.shape == (4,)
    assert network.largest is held
    assert held.shape == (0,)

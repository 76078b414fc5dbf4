"""How far training came belongs to the statistics: whatever carries them to another network, an
average of weights, a checkpoint or a function call, carries it too."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.nn.recurrent_truth import HIDDEN, INPUT, NORMS, SAMPLES, Truth, array, sequences
from tests.tolerances import close
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import steadynorm as sn
from steadynorm.nn import steps

LONGEST, TRAINED = 6, 3  # steps with statistics, and how many of them training reaches


def new() -> Any:
    torch.manual_seed(5)
    return sn.BatchNormLSTM(INPUT, HIDDEN, max_length=LONGEST, dtype=torch.float64)


def trained() -> Any:
    network = new()
    for number in range(3):
        network(2 * sequences(time=TRAINED) + number)
    return network


def expected_outputs(network: Any, x: torch.Tensor) -> Any:
    """The network in inference, in NumPy, with the statistics of the steps that were trained."""
    truth = Truth(network.eval().cells[0])
    for norm in truth.norms.values():
        norm.running = norm.running[:TRAINED]
    return truth.forward(array(x), [len(x)] * SAMPLES)[0]


def averaged(**settings: Any) -> Any:
    network = new()
    average = AveragedModel(network, **settings)
    for number in range(3):
        network(2 * sequences(time=TRAINED) + number)
        average.update_parameters(network)
    return average.module


def copied_by_state() -> Any:
    """As timm's ModelEmaV2: in place, value by value."""
    target, source = new(), trained()
    for to, of in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
        to.copy_(0.25 * to + 0.75 * of)
    return target


def floats_alone() -> Any:
    """As ultralytics' ModelEMA: values of floating point alone, bound anew."""
    target, source = new(), trained()
    state = source.state_dict()
    for name, value in target.state_dict().items():
        if value.dtype.is_floating_point:
            value.data.mul_(0.5).add_(state[name], alpha=0.5)
    return target


def broadcast() -> Any:
    target, source = new(), trained()
    for to, of in zip(target.buffers(), source.buffers(), strict=True):
        to.copy_(of)
    return target


CARRIERS: dict[str, Callable[[], Any]] = {
    "buffers copied": averaged,
    "mean of buffers": lambda: averaged(use_buffers=True),
    "moving average of buffers": lambda: averaged(use_buffers=True, avg_fn=get_ema_avg_fn(0.9)),
    "state, in place": copied_by_state,
    "floats alone": floats_alone,
    "broadcast": broadcast,
    "deepcopy": lambda: copy.deepcopy(trained()),
}


@pytest.mark.parametrize("carried", CARRIERS.values(), ids=CARRIERS)
def test_whatever_carries_statistics_carries_how_far_training_came(carried: Any) -> None:
    network = carried()
    x = sequences(time=LONGEST + 1)
    close(network.eval()(x)[0], expected_outputs(network, x), "forward")


def test_a_call_with_other_parameters_and_buffers() -> None:
    source, target, x = trained().eval(), new().eval(), sequences(time=LONGEST)
    state = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    found = torch.func.functional_call(target, state, (x,))[0]
    close(found, expected_outputs(source, x), "forward")
    # vmap: each network of a stack by its own reach.
    other = new()
    other(sequences(time=LONGEST))
    networks = [source, other.eval()]
    stack = torch.func.stack_module_state(networks)

    def call(state: Any) -> torch.Tensor:
        return torch.func.functional_call(target, state, (x,))[0]

    both = torch.func.vmap(call)(stack)
    for found, network in zip(both, networks, strict=True):
        torch.testing.assert_close(found, network(x)[0], rtol=1e-9, atol=1e-11)


def test_checkpoints_of_earlier_versions_load() -> None:
    """They hold how many steps training had reached as extra state of every normalization."""
    source, x = trained(), sequences(time=LONGEST)
    state = source.state_dict()
    assert not any(name.endswith("_extra_state") for name in state)
    for name in NORMS:
        state[f"cells.0.{name}._extra_state"] = torch.tensor(TRAINED)
    given = list(state)
    for restored in (new(), new()):
        assert restored.load_state_dict(state) == ([], [])
        close(restored.eval()(x)[0], expected_outputs(source, x), "forward")
        state = {name: value for name, value in state.items() if "_extra_state" not in name}
    assert len(given) == len(state) + len(NORMS)


def without_a_look(call: Any, *given: Any, **settings: Any) -> Any:
    """Calls as accelerators do, where the statistics' values are not read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "_can_be_read", lambda _: False)
        return call(*given, **settings)


@pytest.mark.parametrize("hooked", [False, True], ids=["one call", "one call a step"])
@pytest.mark.parametrize("reached", [TRAINED, 0], ids=["some steps", "none"])
def test_selected_on_the_device_as_on_cpu(reached: int, hooked: bool) -> None:
    network = trained() if reached else new()
    if hooked:
        network.cells[0].input_norm.steps[1].register_forward_hook(lambda *_: None)
    x = sequences(time=LONGEST + 1)
    found = without_a_look(network.eval(), x)[0]
    torch.testing.assert_close(found, network(x)[0], rtol=1e-12, atol=1e-13)
    if reached:
        close(found, expected_outputs(network, x), "forward")
    cell, state = network.cells[0], None
    for time in range(len(x)):
        state = without_a_look(cell, x[time], state, step=time)
    torch.testing.assert_close(state[0], found[-1], rtol=1e-9, atol=1e-11)


def test_an_exported_network_reads_the_statistics_it_is_given() -> None:
    """Exported before training, it sees how far training came later."""
    network, x = new().eval(), sequences(time=LONGEST)
    program = torch.export.export(network, (x,)).module()
    torch.testing.assert_close(program(x)[0], network(x)[0], rtol=1e-9, atol=1e-11)
    source = trained()
    program.load_state_dict(source.state_dict())
    close(program(x)[0], expected_outputs(source, x), "forward")

"""All time steps in one call refuse what one call a step refuses, and make way for every hook."""

import copy
import warnings
from typing import Any

import pytest
import torch
from tests.nn.recurrent_truth import TIME, made, sequences
from torch.nn.modules import module as torch_modules

import steadynorm as sn


def norm_of(network: Any) -> Any:
    return network.cells[0].input_norm


def terms(samples: int = 4) -> torch.Tensor:
    return torch.randn(TIME * samples, 16, dtype=torch.float64, requires_grad=True)


def both_ways(network: Any, call: Any) -> tuple[str, str]:
    """What all steps in one call raise, and one call a step."""
    apart = copy.deepcopy(network)
    for step in norm_of(apart).steps:
        step.register_forward_pre_hook(lambda *_: None)
    found = []
    for one in (network, apart):
        before = copy.deepcopy(one.state_dict())
        with pytest.raises((ValueError, RuntimeError)) as caught:
            call(norm_of(one))
        torch.testing.assert_close(one.state_dict(), before, rtol=0, atol=0)
        found.append(str(caught.value))
    return found[0], found[1]


def test_epsilon_of_zero() -> None:
    network = made(eps=0.0)
    joined, apart = both_ways(network, lambda norm: norm.sequence(terms(), (4,) * TIME))
    assert joined == apart
    assert "`eps` must be above 0 in training" in joined
    norm_of(network.eval()).sequence(terms(), (4,) * TIME)  # in inference 0 is right


def test_types_and_channels_that_do_not_go_together() -> None:
    for training in (True, False):
        network = made().train(training)
        wide = terms().float()
        joined, apart = both_ways(network, lambda norm: norm.sequence(wide, (4,) * TIME))  # noqa: B023
        assert joined == apart
        narrow = terms()[:, :15]
        joined, apart = both_ways(network, lambda norm: norm.sequence(narrow, (4,) * TIME))  # noqa: B023
        assert "must have 16 channels" in joined
        assert "must have 16 channels" in apart


def test_one_sequence_under_a_policy_that_needs_two() -> None:
    joined, _ = both_ways(made(), lambda norm: norm.sequence(terms(1), (1,) * TIME))
    assert joined.startswith("TimeStep: training needs more than one value per channel")
    from steadynorm.nn import checks

    checks._warn_of_no_gradient.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        norm_of(made(sn.Renorm())).sequence(terms(1), (1,) * TIME)
    assert ["no gradient reaches" in str(w.message) for w in caught] == [True]


@pytest.mark.parametrize(
    "register",
    ["register_full_backward_hook", "register_full_backward_pre_hook", "register_forward_hook",
     "register_forward_pre_hook"],
)  # fmt: skip
@pytest.mark.parametrize("everywhere", [False, True], ids=["of a step", "of every module"])
def test_hooks_are_called_once_a_step(register: str, everywhere: bool) -> None:
    network, fired = made(), []
    steps = list(norm_of(network).steps)

    def hook(module: Any, *_: Any) -> None:
        fired.extend([module] if module in steps else [])

    if everywhere:
        handles = [getattr(torch_modules, register.replace("_", "_module_", 1))(hook)]
    else:
        handles = [getattr(step, register)(hook) for step in steps]
    try:
        network(sequences().requires_grad_())[0].square().mean().backward()
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(map(steps.index, fired)) == list(range(TIME))


@pytest.mark.parametrize("policy", ["batch", "steady", "running", "renorm", "ghost"])
def test_time_steps_put_into_inference_alone_are_all_there(policy: str) -> None:
    """As fine-tuning does with every batch norm of a model that stays in training."""
    network = made(policy)
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    before = copy.deepcopy(network.state_dict())
    one = sequences(samples=1)  # which no policy refuses in inference
    found, alone = network(sequences())[0], network(one)[0]
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    network.eval()
    torch.testing.assert_close(found, network(sequences())[0], rtol=0, atol=0)
    torch.testing.assert_close(alone, network(one)[0], rtol=0, atol=0)


def test_time_steps_put_into_training_alone_all_learn() -> None:
    network, truth = made("steady").eval(), made("steady")
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.train()
    torch.testing.assert_close(network(sequences())[0], truth(sequences())[0])
    torch.testing.assert_close(network.state_dict(), truth.state_dict())

"""Sequences read in chunks, as in truncated backpropagation, are one to the statistics."""

import copy
from typing import Any

import pytest
import torch
from tests.nn.recurrent_truth import HIDDEN, SAMPLES, TIME, Truth, array, made, sequences
from tests.tolerances import close

import steadynorm as sn

CUT = 2


@pytest.mark.parametrize("trained", [TIME, 3], ids=["all steps trained", "three of them"])
@pytest.mark.parametrize("layers", [1, 2])
def test_inference_in_chunks_is_inference_at_once(layers: int, trained: int) -> None:
    network = made(num_layers=layers).eval()
    for cell in network.cells:
        for norm in (cell.input_norm, cell.hidden_norm, cell.cell_norm):
            for step in norm.steps[trained:]:
                step.reset_running_stats()
    x = sequences(time=TIME + 2)
    expected, last = network(x)
    if layers == 1 and trained == TIME:
        close(expected, Truth(network.cells[0]).forward(array(x), [len(x)] * SAMPLES)[0], "forward")
    outputs, state = [], None
    for start in range(0, len(x), CUT):
        output, state = network(x[start : start + CUT], state, step=start)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-12)
    alone = network(x[:CUT, 0], step=0)[1]
    found = network(x[CUT : 2 * CUT, 0], alone, step=CUT)[0]
    torch.testing.assert_close(found, expected[CUT : 2 * CUT, 0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("policy", [sn.Batch(), sn.Steady(prior=3, window=None)], ids=repr)
def test_training_in_chunks(policy: Any) -> None:
    """A chunk's gradients and statistics are those of its own steps, the state before held fixed.

    The truth in NumPy reads the whole sequence; the gradient of the second chunk's outputs alone is
    stopped where that chunk begins.
    """
    network, x = made(policy), sequences()
    expected = Truth(network.cells[0])
    outputs, *_ = expected.forward(array(x), [TIME] * SAMPLES)
    first, state = network(x[:CUT])
    close(first, outputs[:CUT], "forward")
    state = tuple(part.detach() for part in state)
    given = x[CUT:].clone().requires_grad_()
    second, _ = network(given, state, step=CUT)
    close(second, outputs[CUT:], "forward")
    grad = torch.randn(TIME - CUT, SAMPLES, HIDDEN, dtype=torch.float64)
    second.backward(grad)
    expected.x, expected.trace = expected.x[CUT:], expected.trace[CUT:]
    zero = array(torch.zeros(SAMPLES, HIDDEN))
    right = expected.backward(array(grad), zero, zero)
    close(given.grad, right["x"], "backward", "input")
    for name, parameter in network.cells[0].named_parameters():
        close(parameter.grad, right[name], "backward", name)
    for name, norm in expected.norms.items():
        for time, running in enumerate(norm.running):
            step = getattr(network.cells[0], name).steps[time]
            close(step.running_mean, running.mean, "statistics", f"{name}, step {time}")
            close(step.running_var, running.var, "statistics", f"{name}, step {time}")
            assert int(step.num_batches_tracked) == running.batches


def test_lengths_in_a_later_chunk() -> None:
    network, x, lengths = made("steady"), sequences(), [1, 3, 2, 3, 1, 3, 3]
    cell = copy.deepcopy(network.cells[0])
    found, (h, c) = network(x[CUT:], lengths=lengths, step=CUT)
    state = None
    for time in range(CUT, TIME):
        still = torch.tensor(lengths) > time - CUT
        state = cell(x[time], state, step=time, mask=still)
        torch.testing.assert_close(state[0][still], found[time - CUT][still])
    torch.testing.assert_close(state, (h[0], c[0]))
    torch.testing.assert_close(cell.state_dict(), network.cells[0].state_dict())

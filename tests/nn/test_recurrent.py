"""Batch-normalized LSTM: values, gradients and statistics against NumPy in float64."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tests.nn.recurrent_truth import (
    HIDDEN,
    INPUT,
    NORMS,
    SAMPLES,
    TIME,
    Truth,
    array,
    made,
    sequences,
)
from tests.tolerances import close
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import steadynorm as sn

POLICIES = {
    "batch": sn.Batch(),
    "steady": sn.Steady(prior=3, window=None),
    "running": sn.Running(),
    "renorm": sn.Renorm(warmup=0, r_ramp=2, d_ramp=2),
    "ghost": sn.Ghost(3),
    "frozen": sn.Frozen(),
}
LENGTHS = [2, 5, 3, 5, 1, 5, 4]


def assert_statistics(cell: Any, expected: Truth) -> None:
    for name in NORMS:
        for time, (step, right) in enumerate(
            zip(getattr(cell, name).steps, expected.norms[name].running, strict=True)
        ):
            close(step.running_mean, right.mean, "statistics", f"mean of {name}, step {time}")
            close(step.running_var, right.var, "statistics", f"variance of {name}, step {time}")
            assert int(step.num_batches_tracked) == right.batches


def assert_like_the_truth(network: Any, lengths: list[int] | None, x: torch.Tensor) -> None:
    cell = network.cells[0]
    random = torch.Generator().manual_seed(13)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    n = x.shape[1]
    h, c = normal(1, n, HIDDEN).requires_grad_(), normal(1, n, HIDDEN).requires_grad_()
    x = x.clone().requires_grad_()
    grad, dh, dc = normal(len(x), n, HIDDEN), normal(1, n, HIDDEN), normal(1, n, HIDDEN)
    expected = Truth(cell)
    known = [len(x)] * n if lengths is None else lengths
    outputs, last_h, last_c = expected.forward(array(x), known, array(h[0]), array(c[0]))
    found, state = network(x, (h, c), lengths=lengths)
    close(found, outputs, "forward", "outputs")
    close(state[0], last_h[None], "forward", "last h")
    close(state[1], last_c[None], "forward", "last c")
    torch.autograd.backward((found, *state), (grad, dh, dc))
    past = np.array([[t < length for length in known] for t in range(len(x))])[..., None]
    right = expected.backward(array(grad) * past, array(dh[0]), array(dc[0]))
    close(x.grad, right["x"], "backward", "input")
    close(h.grad[0], right["h"], "backward", "first h")
    close(c.grad[0], right["c"], "backward", "first c")
    for name, parameter in cell.named_parameters():
        close(parameter.grad, right[name], "backward", name)
    assert_statistics(cell, expected)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_training(policy: Any) -> None:
    assert_like_the_truth(made(policy), None, sequences())


@pytest.mark.parametrize("policy", [p for name, p in POLICIES.items() if name != "ghost"], ids=repr)
def test_training_on_unequal_lengths(policy: Any) -> None:
    """Positions past the end take no part in the statistics and carry the state."""
    assert_like_the_truth(made(policy), LENGTHS, sequences())


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["equal", "unequal"])
def test_inference(lengths: Any) -> None:
    assert_like_the_truth(made().eval(), lengths, sequences())


@pytest.mark.parametrize("name", ["batch", "steady"])
def test_steps_past_the_longest_use_the_last_ones_statistics(name: str) -> None:
    assert_like_the_truth(made(POLICIES[name], max_length=3), None, sequences())
    assert_like_the_truth(made(POLICIES[name], max_length=3).eval(), None, sequences())


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_all_steps_in_one_call_are_the_same_as_one_call_a_step(policy: Any) -> None:
    """A hook asks for one call a step; the input's term then takes the other way."""
    together, apart = made(policy), made(policy)
    calls: list[int] = []
    apart.cells[0].input_norm.steps[1].register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        x, grad = sequences(), torch.randn(TIME, SAMPLES, HIDDEN, dtype=torch.float64)
        for network in (together, apart):
            network(x)[0].backward(grad)
    assert len(calls) == 3
    for ours, theirs in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(together.state_dict(), apart.state_dict(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["equal", "unequal"])
def test_every_time_step_remembers_the_gradient_by_itself(lengths: Any) -> None:
    """One memory for each norm and time step, as of the running statistics; in one call or many."""
    network = made(sn.Steady(prior=16, horizon=64, window=16))
    apart = copy.deepcopy(network)
    for step in apart.cells[0].input_norm.steps:
        step.register_forward_pre_hook(lambda *_: None)  # so that every step is a call
    for _ in range(3):
        inputs = [sequences().requires_grad_() for _ in range(2)]
        inputs[1].data.copy_(inputs[0].data)
        grad = torch.randn(TIME, SAMPLES, HIDDEN, dtype=torch.float64)
        for net, x in zip((network, apart), inputs, strict=True):
            net(x, lengths=lengths)[0].backward(grad)
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    memories = {n: b for n, b in network.named_buffers() if n.endswith("gradient_memory")}
    assert len(memories) == len(NORMS) * len(network.cells[0].cell_norm.steps)
    reached = max(lengths) if lengths else TIME
    for name in NORMS:
        steps = getattr(network.cells[0], name).steps[: min(reached, TIME)]
        moved = [step.gradient_memory.any() for step in steps]
        assert all(moved[1:]), name  # at step 0 a zero hidden state has no gradient to remember
    torch.testing.assert_close(dict(apart.named_buffers()), dict(network.named_buffers()))
    assert not any(name.endswith("gradient_memory") for name in network.state_dict())


@pytest.mark.parametrize("lengths", [None, [3, 4, 2, 4]], ids=["equal", "unequal"])
@pytest.mark.parametrize("policy", [sn.Batch(), sn.Running(), sn.Frozen()], ids=repr)
def test_gradcheck(policy: Any, lengths: Any) -> None:
    """Through time, through the statistics; the statistics are put back for every probe."""
    network = made(policy, num_layers=2, bidirectional=True)
    start = {name: buffer.clone() for name, buffer in network.named_buffers()}
    names, tensors = zip(*network.named_parameters(), strict=True)

    def outputs(x: torch.Tensor, h: torch.Tensor, c: torch.Tensor, *parameters: Any) -> Any:
        for name, buffer in network.named_buffers():
            buffer.copy_(start[name])
        with_these = dict(zip(names, parameters, strict=True))
        arguments = ((x, (h, c)), {"lengths": lengths})
        y, state = torch.func.functional_call(network, with_these, *arguments)
        return y, *state

    x = sequences(4, 4).requires_grad_()
    first = [torch.randn(4, 4, HIDDEN, dtype=torch.float64, requires_grad=True) for _ in "hc"]
    assert torch.autograd.gradcheck(outputs, (x, *first, *tensors), fast_mode=True)


# The interface of torch.nn.LSTM ----------------------------------------------------------------


def as_torch(network: Any) -> torch.nn.LSTM:
    """torch's LSTM with the same function in inference: the normalizations folded into it."""
    peer = torch.nn.LSTM(
        INPUT,
        HIDDEN,
        network.num_layers,
        batch_first=network.batch_first,
        bidirectional=network.bidirectional,
        dtype=torch.float64,
    )
    for which, cell in enumerate(network.cells):
        directions = 2 if network.bidirectional else 1
        layer, direction = divmod(which, directions)
        ending = f"_l{layer}" + ("_reverse" if direction else "")
        with torch.no_grad():
            for source, target in (("ih", "input_norm"), ("hh", "hidden_norm")):
                norm = getattr(cell, target)
                step = norm.steps[0]
                scale = norm.weight / (step.running_var + step.eps).sqrt()
                weight = getattr(cell, f"weight_{source}") * scale[:, None]
                getattr(peer, f"weight_{source}{ending}").copy_(weight)
                bias = cell.bias / 2 - step.running_mean * scale
                getattr(peer, f"bias_{source}{ending}").copy_(bias)
            cell.cell_norm.weight.fill_(1)
            cell.cell_norm.bias.zero_()
            cell.cell_norm.steps[0].running_mean.zero_()
            cell.cell_norm.steps[0].running_var.fill_(1 - cell.cell_norm.eps)
    return peer


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
def test_shapes_orders_and_values_are_torchs(batch_first: bool, bidirectional: bool) -> None:
    """In inference one step's statistics make it a plain LSTM with other weights."""
    network = made(
        max_length=1, num_layers=2, batch_first=batch_first, bidirectional=bidirectional
    ).eval()
    peer = as_torch(network)
    x = sequences().transpose(0, 1).contiguous() if batch_first else sequences()
    shape = (4 if bidirectional else 2, SAMPLES, HIDDEN)
    hx = (torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64))
    for given in (None, hx):
        found, expected = network(x, given), peer(x, given)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    one = x[0] if batch_first else x[:, 0]
    own = (hx[0][:, 0], hx[1][:, 0])
    torch.testing.assert_close(network(one, own), peer(one, own), rtol=1e-10, atol=1e-12)
    for sort in (True, False):
        lengths = sorted(LENGTHS, reverse=True) if sort else LENGTHS
        packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first, enforce_sorted=sort)
        found, expected = network(packed, hx), peer(packed, hx)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-10, atol=1e-12)
        for mine, theirs in zip(found[0], expected[0], strict=True):
            assert (mine is None) is (theirs is None)
            if mine is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    found = network(x, hx, lengths=LENGTHS)
    padded = pad_packed_sequence(expected[0], batch_first)[0]
    torch.testing.assert_close(found, (padded, expected[1]), rtol=1e-10, atol=1e-12)


def test_a_packed_sequence_trains_as_lengths_do() -> None:
    first, second = made(sn.Steady(), bidirectional=True), made(sn.Steady(), bidirectional=True)
    x = sequences()
    packed = pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False)
    done, state = first(packed)
    assert isinstance(done, PackedSequence)
    torch.testing.assert_close(
        (pad_packed_sequence(done)[0], state), second(x, lengths=torch.tensor(LENGTHS))
    )
    torch.testing.assert_close(first.state_dict(), second.state_dict())


def test_the_padding_has_no_say() -> None:
    x = sequences()
    dirty = x.clone()
    for sample, length in enumerate(LENGTHS):
        dirty[length:, sample] = float("nan")
    clean, other = made("steady"), made("steady")
    torch.testing.assert_close(clean(x, lengths=LENGTHS), other(dirty, lengths=LENGTHS))
    torch.testing.assert_close(clean.state_dict(), other.state_dict())


def test_dropout_acts_between_layers_in_training_alone() -> None:
    # Frozen: where all samples are the same, a batch's variance is 0 and eps blows roundings up.
    plain, dropping = (made(sn.Frozen(), num_layers=2, dropout=p) for p in (0.0, 1.0))
    torch.testing.assert_close(plain.eval()(sequences()), dropping.eval()(sequences()))
    zeros = dropping.train()(sequences())[0]
    nothing = Truth(made(sn.Frozen(), num_layers=2).cells[1])
    expected, *_ = nothing.forward(np.zeros((TIME, SAMPLES, HIDDEN)), [TIME] * SAMPLES)
    close(zeros, expected, "forward")


def test_the_cell_step_by_step_is_the_network() -> None:
    network, cell = made("steady"), made("steady").cells[0]
    x = sequences()
    outputs, (h, c) = network(x, lengths=LENGTHS)
    state = None
    for time in range(TIME):
        state = cell(x[time], state, step=time, mask=torch.tensor(LENGTHS) > time)
        still = torch.tensor(LENGTHS) > time
        torch.testing.assert_close(state[0][still], outputs[time][still])
    torch.testing.assert_close(state, (h[0], c[0]))
    torch.testing.assert_close(cell.state_dict(), network.cells[0].state_dict())
    alone = cell.eval()(x[0, 0])
    torch.testing.assert_close(alone[0], cell(x[0])[0][0])


# Statistics -----------------------------------------------------------------------------------


def test_in_inference_steps_never_trained_use_the_last_trained_ones() -> None:
    network = sn.BatchNormLSTM(INPUT, HIDDEN, max_length=6, dtype=torch.float64)
    network(sequences(time=3))
    restored = sn.BatchNormLSTM(INPUT, HIDDEN, max_length=6, dtype=torch.float64)
    restored.load_state_dict(network.state_dict())
    for trained in (network, restored, copy.deepcopy(network)):
        cell = trained.eval().cells[0]
        serving = [one.layer for one in cell.cell_norm.serving(0, 8)]
        assert serving == [cell.cell_norm.steps[t] for t in (0, 1, 2, 2, 2, 2, 2, 2)]
        expected = Truth(cell)
        for norm in expected.norms.values():
            norm.running = norm.running[:3]
        outputs, *_ = expected.forward(array(sequences()), [TIME] * SAMPLES)
        close(trained(sequences())[0], outputs, "forward")


def test_calibrate_gives_every_step_the_populations_statistics() -> None:
    network = made()
    x = sequences(samples=12)
    report = sn.calibrate(network, [x])
    assert {row.status for row in report.layers} == {"calibrated"}
    cell = network.cells[0]
    terms = array(x) @ array(cell.weight_ih).T
    for time, step in enumerate(cell.input_norm.steps):
        close(step.running_mean, terms[time].mean(0), "statistics")
        close(step.running_var, terms[time].var(0, ddof=1), "statistics")
    # All by their own batch: what inference then does differs from training by Bessel's factor.
    network.train()
    trained = Truth(cell)
    outputs, *_ = trained.forward(array(x), [TIME] * 12)
    calibrated = network.eval()(x)[0].detach()
    assert float((calibrated - torch.from_numpy(outputs)).abs().max()) < 0.1


def test_surgery_knows_the_steps() -> None:
    network = made()
    steady, changes = sn.convert(network, statistics="steady")
    assert [change.what for change in changes].count("converted") == 3 * TIME
    assert all(step.statistics == sn.Steady() for step in steady.cells[0].cell_norm.steps)
    x = sequences(samples=1)
    with pytest.raises(ValueError, match="more than one sequence"):
        network(x)
    assert steady(x)[0].shape == (TIME, 1, HIDDEN)
    frozen, _ = sn.freeze(network)
    before = copy.deepcopy(frozen.state_dict())
    frozen.train()(sequences())
    torch.testing.assert_close(frozen.state_dict(), before)
    groups = sn.parameter_groups(network, weight_decay=0.1)
    cell = network.cells[0]
    decays = {id(parameter) for parameter in groups[0]["params"]}
    assert decays == {id(cell.weight_ih), id(cell.weight_hh)}


def test_constant_beginnings_and_the_initial_noise() -> None:
    """Without noise h is the same in all samples, and only eps stands below the gradient."""
    torch.manual_seed(0)
    x = torch.cat([torch.zeros(TIME - 1, SAMPLES, INPUT), torch.randn(1, SAMPLES, INPUT)])

    def spread(noise: float) -> float:
        network = sn.BatchNormLSTM(INPUT, HIDDEN, max_length=TIME, initial_noise=noise)
        network(x)
        cell: Any = network.cells[0]
        return float(cell.hidden_norm.steps[1].running_var.min()) / 0.9 - 1  # 0.1·v + 0.9·1

    assert spread(0.0) == pytest.approx(0, abs=1e-6)
    assert spread(0.1) > 1e-9
    quiet = sn.BatchNormLSTM(INPUT, HIDDEN, max_length=TIME, initial_noise=0.1).eval()
    torch.testing.assert_close(quiet(x), quiet(x), rtol=0, atol=0)


# Types, compilation ---------------------------------------------------------------------------


def test_starting_values() -> None:
    network: Any = sn.BatchNormLSTM(INPUT, HIDDEN, max_length=2)
    cell = network.cells[0]
    assert all(bool((getattr(cell, norm).weight == 0.1).all()) for norm in NORMS)
    assert cell.input_norm.bias is None
    assert cell.hidden_norm.bias is None
    assert bool((cell.cell_norm.bias == 0).all())
    assert sum(p.numel() for p in network.parameters()) == (
        4 * HIDDEN * (INPUT + HIDDEN + 1) + 2 * 4 * HIDDEN + 2 * HIDDEN
    )


def test_half_precision_keeps_wide_statistics() -> None:
    network: Any = sn.BatchNormLSTM(INPUT, HIDDEN, max_length=TIME, statistics="steady")
    network = network.to(torch.bfloat16)
    output, state = network(sequences().to(torch.bfloat16))
    assert output.dtype is state[1].dtype is torch.bfloat16
    assert network.cells[0].cell_norm.steps[0].running_var.dtype is torch.float32


def test_autocast() -> None:
    network = sn.BatchNormLSTM(INPUT, HIDDEN, max_length=TIME)
    twin = copy.deepcopy(network)
    x = sequences().float()
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = twin(x)
        (output * torch.randn_like(output)).sum().backward()
    torch.testing.assert_close(output.float(), network(x)[0], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_autocast_gives_the_types_that_torchs_lstm_gives(bidirectional: bool) -> None:
    settings: Any = {"num_layers": 2, "bidirectional": bidirectional}
    ours = sn.BatchNormLSTM(INPUT, HIDDEN, max_length=TIME, **settings)
    torchs = torch.nn.LSTM(INPUT, HIDDEN, **settings)
    x = sequences().float()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = ours(x), torchs(x)
        flat = [(y.dtype, h.dtype, c.dtype) for y, (h, c) in (found, expected)]
        assert flat[0] == flat[1] == (torch.bfloat16,) * 3
        ours.eval()
    found = ours(x)
    assert found[0].dtype is found[1][1].dtype is torch.float32

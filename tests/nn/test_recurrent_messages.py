"""What the batch-normalized LSTM refuses, in whole sentences, and that nothing has changed then."""

import copy
from typing import Any

import pytest
import torch
from tests.nn.recurrent_truth import HIDDEN, SAMPLES, made, sequences

import steadynorm as sn

LSTM = "BatchNormLSTM: "
REFUSED = {
    "features": (
        lambda net: net(torch.zeros(2, 3, 9)),
        LSTM + "`input` must have shape (T, N, 3) or (T, 3); got (2, 3, 9).",
    ),
    "no time": (
        lambda net: net(torch.zeros(0, 3, 3)),
        LSTM + "`input` must have at least one time step; got (0, 3, 3).",
    ),
    "state": (
        lambda net: net(torch.zeros(2, 3, 3), (torch.zeros(1, 3, 4), torch.zeros(1, 2, 4))),
        LSTM + "`hx` must hold c of shape (1, 3, 4); got (1, 2, 4).",
    ),
    "lengths' number": (
        lambda net: net(torch.zeros(2, 3, 3), lengths=[1, 2]),
        LSTM + "`lengths` must be 3 whole numbers, one a sequence; got torch.int64 of shape (2,).",
    ),
    "lengths' values": (
        lambda net: net(torch.zeros(2, 3, 3), lengths=[0, 1, 3]),
        LSTM + "`lengths` must lie in 1 to 2, the input's time steps; got 0 to 3.",
    ),
    "alone at the end": (
        lambda net: net(torch.zeros(3, 3, 3, dtype=torch.float64), lengths=[2, 1, 3]),
        LSTM
        + "training needs more than one sequence at every time step under Batch(); got 1 at step "
        "2. Use a larger batch, sequences of more even length, or statistics=sn.Steady(), "
        "sn.Running() or sn.Frozen(), which work with one.",
    ),
    "cell's step": (
        lambda net: net.cells[0](torch.zeros(2, 3), step=-1),
        "BatchNormLSTMCell: `step` must be a whole number from 0 on; got -1.",
    ),
    "cell's input": (
        lambda net: net.cells[0](torch.zeros(2, 3, 3)),
        "BatchNormLSTMCell: `input` must have shape (N, 3) or (3,); got (2, 3, 3).",
    ),
    "step": (
        lambda net: net(torch.zeros(2, 3, 3), step=-1),
        LSTM + "`step` must be a whole number from 0 on; got -1.",
    ),
    "step both ways": (
        lambda _: sn.BatchNormLSTM(3, 4, bidirectional=True, max_length=2)(
            torch.zeros(2, 3, 3), step=1
        ),
        LSTM + "`step` must be 0 for a bidirectional network, whose backward direction counts from "
        "each sequence's end; got 1.",
    ),
    "alone in a later chunk": (
        lambda net: net(torch.zeros(1, 1, 3, dtype=torch.float64), step=3),
        LSTM
        + "training needs more than one sequence at every time step under Batch(); got 1 at step "
        "3. Use a larger batch, sequences of more even length, or statistics=sn.Steady(), "
        "sn.Running() or sn.Frozen(), which work with one.",
    ),
    "projection": (
        lambda _: sn.BatchNormLSTM(3, 4, proj_size=2, max_length=2),
        LSTM + "`proj_size` must be 0, there is no projection of h; got 2. Put a torch.nn.Linear "
        "after it.",
    ),
    "sizes": (
        lambda _: sn.BatchNormLSTM(3, 0, max_length=2),
        "BatchNormLSTMCell: `hidden_size` must be at least 1; got 0.",
    ),
    "dropout": (
        lambda _: sn.BatchNormLSTM(3, 4, dropout=2, max_length=2),
        LSTM + "`dropout` must lie in [0, 1]; got 2.",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_say_what_to_do_and_change_nothing(call: Any, message: str) -> None:
    network = made()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError) as caught:
        call(network)
    assert str(caught.value) == message
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [sn.BatchNormLSTM, sn.BatchNormLSTMCell])
def test_the_longest_length_is_asked_for(kind: Any) -> None:
    with pytest.raises(TypeError) as caught:
        kind(3, 4)
    assert str(caught.value) == (
        f"{kind.__name__}: `max_length` is required, the number of time steps with statistics of "
        f"their own: usually the longest sequence's length. torch.nn.LSTM has no such argument."
    )


def test_what_scripts_call_on_torchs_lstm() -> None:
    network = made(proj_size=0)
    before = copy.deepcopy(network.state_dict())
    assert network.flatten_parameters() is None
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_wrong_kinds() -> None:
    with pytest.raises(TypeError, match=r"`max_length` must be a whole number; got 2\.5"):
        sn.BatchNormLSTM(3, 4, max_length=2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a tensor or a PackedSequence; got list"):
        made()([1, 2])
    with pytest.raises(TypeError, match="`hx` must be a pair of tensors"):
        made()(sequences(), torch.zeros(1, SAMPLES, HIDDEN))


def test_time_steps_that_torch_made_into_synchronized_layers() -> None:
    network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(made())
    with pytest.raises(TypeError, match=r"must be TimeStep layers; got SyncBatchNorm, as .* makes"):
        network(sequences())

"""Long short-term memory with batch normalization inside the recurrence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from steadynorm.kernels.reference import padding
from steadynorm.kernels.reference.torch_arrays import reference
from steadynorm.nn import checks, packed_rows, recurrent_checks
from steadynorm.nn.recurrent_checks import State
from steadynorm.nn.steps import Served, StepNorm, learns
from steadynorm.statistics import Policy, PolicyName


class BatchNormLSTMCell(nn.Module):
    """One time step of a batch-normalized LSTM, in place of `torch.nn.LSTMCell`.

        i, f, g, o = BN(weight_ih·x; γ_x) + BN(weight_hh·h; γ_h) + bias
        c' = σ(f)·c + σ(i)·tanh(g)        h' = σ(o)·tanh(BN(c'; γ_c, β_c))

    Each of the three normalizations has statistics for every time step and one γ for all steps; the
    first two have no β, since `bias` does its work, and the cell state itself is not normalized,
    so that gradient flows through it unhindered. Every training call updates the statistics of
    its time step once.

    Args:
        input_size: features of x.
        hidden_size: H, features of h and c.
        bias: False leaves `bias` out.
        device, dtype: of parameters and statistics.
        max_length: time steps with statistics of their own. Later ones use the last one's, and in
            inference steps that no training batch has reached use the last one reached.
        statistics: the policy of every normalization, or its lower-case name.
        gain: what γ starts at.
        eps: added to variances.
        momentum: weight of the new batch in the running statistics, as of the layers.

    Shapes: x (N, input_size), h and c (N, H), mask (N,); or without N, a batch of one.
    Parameters: weight_ih (4H, input_size), weight_hh (4H, H), bias (4H,), gates in torch's order
    i, f, g, o; `input_norm.weight` and `hidden_norm.weight` (4H,), `cell_norm.weight` and
    `cell_norm.bias` (H,). Weights and bias start uniform in ±1/√H, as torch's.

    Raises:
        ValueError: wrong shapes or settings; one sample in training under a policy that needs two.
            Nothing is updated then.
        TypeError: wrong kinds of arguments.

    >>> import torch, steadynorm as sn
    >>> cell = sn.BatchNormLSTMCell(3, 5, max_length=8)
    >>> x = torch.randn(7, 4, 3)  # seven time steps of four samples
    >>> state = None
    >>> for step in range(7):
    ...     state = cell(x[step], state, step=step)
    >>> state[0].shape
    torch.Size([4, 5])

    Differs from torch: one bias, since two would only add up; `step` says which time step it is.
    Keras and flax have no batch-normalized LSTM.

    Source: Cooijmans et al. 2016, section 3, equations 6 to 8; γ = 0.1 is of section 4.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        max_length: int | None = None,
        statistics: Policy | PolicyName = "batch",
        gain: float = 0.1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        owner = type(self).__name__
        max_length = recurrent_checks.given_length(max_length, owner)
        for name, value in (
            ("input_size", input_size),
            ("hidden_size", hidden_size),
            ("max_length", max_length),
        ):
            recurrent_checks.positive(name, value, owner)
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size, **made))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size, **made))
        if bias:
            self.bias: nn.Parameter | None = nn.Parameter(torch.empty(4 * hidden_size, **made))
        else:
            self.register_parameter("bias", None)
        made |= {"eps": eps, "momentum": momentum, "statistics": statistics}
        self.input_norm = StepNorm(4 * hidden_size, max_length, gain, bias=False, **made)
        self.hidden_norm = StepNorm(4 * hidden_size, max_length, gain, bias=False, **made)
        self.cell_norm = StepNorm(hidden_size, max_length, gain, bias=True, **made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights and bias uniform in ±1/√H, γ to `gain`, β_c to 0; statistics stay."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in (self.weight_ih, self.weight_hh, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)
        for norm in (self.input_norm, self.hidden_norm, self.cell_norm):
            norm.reset_parameters()

    def forward(
        self,
        input: Tensor,
        hx: State | None = None,
        *,
        step: int = 0,
        mask: Tensor | None = None,
    ) -> State:
        """The state after time step `step`, counted from 0.

        `hx` is (h, c), zeros if None. `mask` (N,) is True where a sequence goes on: the others
        keep their state and take no part in the statistics.
        """
        owner = type(self).__name__
        if input.ndim not in (1, 2) or input.shape[-1] != self.input_size:
            raise ValueError(
                f"{owner}: `input` must have shape (N, {self.input_size}) or ({self.input_size},); "
                f"got {tuple(input.shape)}."
            )
        recurrent_checks.check_step(step, owner)
        shape = (*input.shape[:-1], self.hidden_size)
        state = (
            recurrent_checks.zeros(input, shape)
            if hx is None
            else recurrent_checks.checked_state(hx, shape, owner)
        )
        if input.ndim == 1:
            if mask is not None:
                mask = mask.unsqueeze(0)
            rows = (state[0].unsqueeze(0), state[1].unsqueeze(0))
            h, c = self(input.unsqueeze(0), rows, step=step, mask=mask)
            return h.squeeze(0), c.squeeze(0)
        x, active = input, None  # which sequences go on; the others keep their state
        if mask is None:
            self._check_size(input.shape[0], step, owner)
        else:
            mask = active = checks.expanded_mask(mask, input, owner)
            # NaN there would reach the gradient of weight_ih.
            (x,) = padding.zeroed(reference, mask.unsqueeze(1), input)
        term = self.input_norm(F.linear(x, self.weight_ih), step, mask=mask)
        h, c = self.advance(term, state, step, mask=mask)
        if active is not None:
            column = active.unsqueeze(1)
            h, c = (torch.where(column, new, old) for new, old in zip((h, c), state, strict=True))
        return h, c

    def advance(
        self,
        term: Tensor,
        state: State,
        step: int,
        served: Sequence[Served | None] = (None, None),
        mask: Tensor | None = None,
    ) -> State:
        """The next state from the input's normalized term (N, 4H) and the state before.

        `served` is what serves the hidden state's and the cell state's normalization at this step,
        where a whole sequence is read.
        """
        h, c = state
        gates = self.hidden_norm(
            F.linear(h, self.weight_hh), step, self.bias,
            served=served[0], residual=term, mask=mask,
        )  # fmt: skip
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        seen = self.cell_norm(c, step, served=served[1], activation="tanh", mask=mask)
        return o.sigmoid() * seen, c

    def _check_size(self, samples: int, step: int, owner: str) -> None:
        norm = self.hidden_norm
        policy = norm.policy
        if policy.batch_alone and learns(norm.steps) and norm.smallest_group(samples) == 1:
            raise ValueError(
                f"{owner}: training needs more than one sequence at every time step under "
                f"{policy!r}; got {samples} at step {step}. Use a larger batch, sequences of more "
                f"even length, or statistics=sn.Steady(), sn.Running() or sn.Frozen(), which work "
                f"with one."
            )

    def extra_repr(self) -> str:
        """The sizes."""
        bias = "" if self.bias is not None else ", bias=False"
        return f"{self.input_size}, {self.hidden_size}{bias}"


class BatchNormLSTM(nn.Module):
    """A batch-normalized LSTM over whole sequences, in place of `torch.nn.LSTM`.

    The recurrence is `BatchNormLSTMCell`'s; `cells` holds one cell for each layer and direction
    (forward and backward of layer 0 first). A cell's time step counts from where it starts to read:
    the backward direction's step 0 is each sequence's last element.

    Args:
        input_size, hidden_size: features of the input and of h.
        num_layers: cells stacked on one another.
        bias: False leaves the gates' bias out.
        batch_first: (N, T, features) instead of (T, N, features); states are not concerned.
        dropout: share of each layer's outputs set to 0 in training, but for the last layer's.
        bidirectional: a second cell reads backwards, and the outputs are put side by side.
        proj_size: 0, as there is no projection of h; torch's place for it among the arguments.
        device, dtype: of parameters and statistics.
        max_length: time steps with statistics of their own, usually the longest sequence's
            length; required. Longer sequences work: later steps use the last one's.
        statistics: the policy of every normalization, or its lower-case name. `Batch` needs two
            sequences at every time step; where the longest sequence stands alone, use `Steady`.
        gain: what γ starts at.
        initial_noise: standard deviation of the noise that an initial h of zero gets in training.
            Where all sequences begin with the same values (black margins), h would be the same in
            all samples, its variance 0, and every step would multiply the gradient by γ/√eps, 32;
            0.1 cures it. Where the first inputs differ, 0 is right.
        eps: added to variances.
        momentum: weight of the new batch in the running statistics, as of the layers.

    Shapes: input (T, N, input_size), or (T, input_size) for one sequence, or a `PackedSequence`;
    output the same with D·H features, D = 2 if bidirectional; h and c (num_layers·D, N, H).

    Raises:
        ValueError: wrong shapes or settings; a single sequence at some time step in training under
            a policy that needs two. Nothing is updated then.
        TypeError: wrong kinds of arguments.

    >>> import torch, steadynorm as sn
    >>> lstm = sn.BatchNormLSTM(3, 5, max_length=7)
    >>> output, (h, c) = lstm(torch.randn(7, 4, 3))
    >>> output.shape, h.shape
    (torch.Size([7, 4, 5]), torch.Size([1, 4, 5]))

    Differs from torch: parameters belong to `cells`; one bias; `proj_size` is 0; `lengths`, `step`.

    Source: Cooijmans et al. 2016. They add the noise where sequential MNIST begins with black
    pixels (section 5.1).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        max_length: int | None = None,
        statistics: Policy | PolicyName = "batch",
        gain: float = 0.1,
        initial_noise: float = 0.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        owner = type(self).__name__
        max_length = recurrent_checks.given_length(max_length, owner)
        if proj_size:
            raise ValueError(
                f"{owner}: `proj_size` must be 0, there is no projection of h; got {proj_size!r}. "
                f"Put a torch.nn.Linear after it."
            )
        recurrent_checks.positive("num_layers", num_layers, owner)
        if not 0 <= dropout <= 1:
            raise ValueError(f"{owner}: `dropout` must lie in [0, 1]; got {dropout!r}.")
        if not initial_noise >= 0:
            raise ValueError(f"{owner}: `initial_noise` must be at least 0; got {initial_noise!r}.")
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.initial_noise = initial_noise
        directions = 2 if bidirectional else 1
        self.cells = nn.ModuleList(
            BatchNormLSTMCell(
                input_size if layer == 0 else directions * hidden_size,
                hidden_size,
                bias,
                device,
                dtype,
                max_length=max_length,
                statistics=statistics,
                gain=gain,
                eps=eps,
                momentum=momentum,
            )
            for layer in range(num_layers)
            for _ in range(directions)
        )

    def flatten_parameters(self) -> None:
        """Nothing: torch's LSTM lays out its parameters for cuDNN, which does not serve here."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        step: int = 0,
    ) -> tuple[Tensor | PackedSequence, State]:
        """Outputs of the last layer at every time step, and the last states (h, c).

        `hx` are the first states, zeros if None. `step` is the time step of the input's first
        element, counted from 0, for sequences that are read in chunks: the statistics of a chunk
        are those of its own time steps. `lengths` (N,) are the lengths of padded
        sequences: what lies past a sequence's end takes no part in the statistics, its output is 0,
        and the state returned is that at its end. A `PackedSequence` gives the same, packed.
        """
        recurrent_checks.check_step(step, type(self).__name__)
        if step and self.bidirectional:
            raise ValueError(
                f"{type(self).__name__}: `step` must be 0 for a bidirectional network, whose "
                f"backward direction counts from each sequence's end; got {step}."
            )
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError(
                    f"{type(self).__name__}: `lengths` must be None for a PackedSequence, which "
                    f"knows them; got both."
                )
            return self._packed(input, hx, step)
        self._check_input(input)
        if input.ndim == 2:
            return self._one_sequence(input, hx, lengths, step)
        if lengths is not None:
            packed = self._packed_by(input, lengths)
            done, state = self._packed(packed, hx, step)
            time = input.shape[1 if self.batch_first else 0]
            return pad_packed_sequence(done, self.batch_first, total_length=time)[0], state
        turned = input.transpose(0, 1) if self.batch_first else input
        time, samples = turned.shape[:2]
        rows, state = self._run(turned.flatten(0, 1), (samples,) * time, hx, step)
        result = rows.unflatten(0, (time, samples))
        return result.transpose(0, 1) if self.batch_first else result, state

    def _one_sequence(
        self, input: Tensor, hx: State | None, lengths: Tensor | Sequence[int] | None, step: int
    ) -> tuple[Tensor, State]:
        axis = 0 if self.batch_first else 1
        if hx is not None:
            shape = (len(self.cells), self.hidden_size)
            h, c = recurrent_checks.checked_state(hx, shape, type(self).__name__)
            hx = (h.unsqueeze(1), c.unsqueeze(1))
        result, (h, c) = self(input.unsqueeze(axis), hx, lengths=lengths, step=step)
        return result.squeeze(axis), (h.squeeze(1), c.squeeze(1))

    def _packed(
        self, packed: PackedSequence, hx: State | None, step: int
    ) -> tuple[PackedSequence, State]:
        owner = type(self).__name__
        if packed.data.shape[1:] != (self.input_size,):
            raise ValueError(
                f"{owner}: `input` must have {self.input_size} features; got packed data of shape "
                f"{tuple(packed.data.shape)}."
            )
        order, back = packed.sorted_indices, packed.unsorted_indices
        sizes = tuple(packed.batch_sizes.tolist())
        if hx is not None:
            h, c = recurrent_checks.checked_state(
                hx, (len(self.cells), sizes[0], self.hidden_size), owner
            )
            hx = (h, c) if order is None else (h.index_select(1, order), c.index_select(1, order))
        rows, (h, c) = self._run(packed.data, sizes, hx, step)
        if back is not None:
            h, c = h.index_select(1, back), c.index_select(1, back)
        return PackedSequence(rows, packed.batch_sizes, order, back), (h, c)

    def _run(
        self, rows: Tensor, sizes: tuple[int, ...], hx: State | None, step: int
    ) -> tuple[Tensor, State]:
        """All layers over packed rows, `sizes[t]` of them for time step `step` + t."""
        owner = type(self).__name__
        shape = (len(self.cells), sizes[0], self.hidden_size)
        state = (
            self._first_state(rows, shape)
            if hx is None
            else recurrent_checks.checked_state(hx, shape, owner)
        )
        alone = next((t for t in range(len(sizes)) if sizes[t] == sizes[-1]), 0)
        cells: list[Any] = list(self.cells)
        for cell in cells:
            cell._check_size(sizes[-1], step + alone, owner)  # before any statistics move
        directions = 2 if self.bidirectional else 1
        backwards = packed_rows.backwards(sizes, rows.device) if self.bidirectional else None
        ends: list[State] = []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                rows = F.dropout(rows, self.dropout, self.training)
            sides = []
            for direction in range(directions):
                which = layer * directions + direction
                first = (state[0][which], state[1][which])
                turn = backwards if direction else None
                read = rows if turn is None else rows.index_select(0, turn)
                done, end = packed_rows.read(cells[which], read, sizes, first, step)
                sides.append(done if turn is None else done.index_select(0, turn))
                ends.append(end)
            rows = sides[0] if directions == 1 else torch.cat(sides, 1)
        return rows, (torch.stack([h for h, _ in ends]), torch.stack([c for _, c in ends]))

    def _first_state(self, rows: Tensor, shape: tuple[int, ...]) -> State:
        h, c = recurrent_checks.zeros(rows, shape)
        if self.training and self.initial_noise:
            h = h.normal_(0, self.initial_noise)
        return h, c

    def _check_input(self, input: Tensor) -> None:
        owner = type(self).__name__
        if not isinstance(input, Tensor):
            raise TypeError(
                f"{owner}: `input` must be a tensor or a PackedSequence; "
                f"got {type(input).__name__}."
            )
        if input.ndim not in (2, 3) or input.shape[-1] != self.input_size:
            axes = "(N, T, {})" if self.batch_first else "(T, N, {})"
            raise ValueError(
                f"{owner}: `input` must have shape {axes.format(self.input_size)} or "
                f"(T, {self.input_size}); got {tuple(input.shape)}."
            )
        if input.shape[1 if self.batch_first and input.ndim == 3 else 0] == 0:
            raise ValueError(
                f"{owner}: `input` must have at least one time step; got {tuple(input.shape)}."
            )

    def _packed_by(self, input: Tensor, lengths: Tensor | Sequence[int]) -> PackedSequence:
        time, samples = input.shape[:2][:: -1 if self.batch_first else 1]
        known = torch.as_tensor(lengths, device="cpu")
        if known.shape != (samples,) or known.is_floating_point() or known.dtype == torch.bool:
            raise ValueError(
                f"{type(self).__name__}: `lengths` must be {samples} whole numbers, one a "
                f"sequence; got {known.dtype} of shape {tuple(known.shape)}."
            )
        if samples and not 1 <= int(known.min()) <= int(known.max()) <= time:
            raise ValueError(
                f"{type(self).__name__}: `lengths` must lie in 1 to {time}, the input's time "
                f"steps; got {int(known.min())} to {int(known.max())}."
            )
        return pack_padded_sequence(input, known, self.batch_first, enforce_sorted=False)

    def extra_repr(self) -> str:
        """What differs from the defaults."""
        parts = [f"{self.input_size}, {self.hidden_size}"]
        parts += [f"num_layers={self.num_layers}"] if self.num_layers != 1 else []
        parts += [
            f"{name}=True" for name in ("batch_first", "bidirectional") if getattr(self, name)
        ]
        parts += [
            f"{name}={getattr(self, name)}"
            for name in ("dropout", "initial_noise")
            if getattr(self, name)
        ]
        return ", ".join(parts)

"""`monitor`: what a training run does to the statistics, layer by layer and step by step."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import isfinite, isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steadynorm.doctor.calls import NormCall
from steadynorm.doctor.evidence.training import (
    ENOUGH,
    WINDOW,
    ChannelReading,
    Reading,
    TrainingRun,
    trend,
)
from steadynorm.doctor.monitor_hooks import OwnHook
from steadynorm.doctor.writers import writers
from steadynorm.models.graph import tensors
from steadynorm.models.layers import recognize, unwrapped
from steadynorm.nn.recomputation import is_recomputation

if TYPE_CHECKING:
    from steadynorm.doctor.diagnosis import Report

STEPS_IN_MEMORY = 500  # beyond that every second one is dropped, again and again


def monitor(
    model: nn.Module,
    every: int = 50,
    *,
    to: Any = (),
    optimizer: Any = None,
) -> Monitor:
    """Monitor every batch norm of `model` while it trains.

    A step is a forward of the whole model in training mode with gradients on. At the first and each
    `every`-th after it, the input of each batch norm is compared with the running statistics as
    they were before that step. `steadynorm.doctor.evidence.training.Reading` says what is recorded.
    Nothing of the model changes: hooks on the layers are there during such a forward alone, and the
    one on the model until the end. A copy of the model is not monitored.

    Args:
        model: a model of any make; DistributedDataParallel's and torch.compile's wrappers too. A
            compiled model runs uncompiled at the steps that are read.
        every: steps from one reading to the next.
        to: where readings go as they are made: TensorBoard's `SummaryWriter` (or anything with
            `add_scalar`), the path of a CSV file, a function that takes a dict, or several of them.
        optimizer: lets the report judge weight decay too; one or several.

    Returns:
        A `Monitor`, to be used in a `with` statement.

    Raises:
        TypeError, ValueError: for arguments that make no sense, and for a model that was compiled
            in place by `model.compile()`, whose hooks would not be called.

    >>> import torch, steadynorm as sn
    >>> _ = torch.manual_seed(0)
    >>> network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
    >>> with sn.monitor(network, every=5) as watch:
    ...     for _ in range(20):
    ...         network(torch.randn(16, 4) + 3).square().mean().backward()
    >>> watch.steps, [reading.step for reading in watch.readings]
    (20, [0, 5, 10, 15])
    """
    return Monitor(model, every, to=to, optimizer=optimizer)


class Monitor:
    """Records a training run; see `monitor`. `steps`: training forwards so far."""

    def __init__(
        self,
        model: nn.Module,
        every: int = 50,
        *,
        to: Any = (),
        optimizer: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"monitor: `model` must be a torch.nn.Module; got {type(model)}.")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"monitor: `every` must be an integer of at least 1; got {every!r}.")
        if model._compiled_call_impl is not None:
            raise ValueError(
                "monitor: `model` was compiled in place by model.compile(), which compiles its "
                "hooks too. Use model = torch.compile(model) instead."
            )
        self.model = model
        self.every = every
        self.steps = 0
        self._optimizer = optimizer
        self._writers = writers(to)
        self._readings: list[Reading] = []
        self._by_channel: dict[str, deque[ChannelReading]] = {}
        self._stride = every  # between the steps that are kept
        self._first_nonfinite: dict[str, int] = {}  # steps, by layer
        self._pending: list[NormCall] = []
        self._counts_before = self._counts()
        self._in_inference = 0
        self._on_model: list[Any] = []
        self._on_layers: list[Any] = []
        self._stance: Any = None

    @property
    def readings(self) -> tuple[Reading, ...]:
        """All that is kept, in the order of steps, and of calls within a step."""
        self._settle()
        return tuple(self._readings)

    def start(self) -> Monitor:
        """Begin; `with` does it."""
        if self._on_model:
            raise RuntimeError("monitor: this Monitor is running already.")
        self._on_model = [self.model.register_forward_pre_hook(OwnHook(self._before))]
        return self

    def next_forward(self) -> None:
        """Watch the next forward of the model alone, whatever becomes of it; instead of `start`."""
        self._disarm()
        self._on_layers = [self.model.register_forward_pre_hook(OwnHook(self._only))]

    def _only(self, model: nn.Module, args: Any) -> None:
        self._disarm()
        self._before(model, args)

    def stop(self) -> None:
        """End: removes every hook and writes what was read. Calling it twice is no harm."""
        self._disarm()
        for handle in self._on_model:
            handle.remove()
        self._on_model = []
        self._settle()

    def __enter__(self) -> Monitor:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self) -> TrainingRun:
        """All that was seen, as evidence for the rules."""
        readings, seen = self.readings, self._by_channel
        trends = {n: found for n, last in seen.items() if (found := trend(last, self.steps))}
        before = self._counts_before
        updates = {n: count - before[n] for n, count in self._counts().items() if n in before}
        return TrainingRun(
            self.steps, self.every, tuple(seen), readings, trends, updates, self._in_inference
        )

    def report(self, *, select: Iterable[str] = (), ignore: Iterable[str] = ()) -> Report:
        """What the doctor says of the model as it is now, and of the run so far."""
        from steadynorm.doctor.diagnosis import judge
        from steadynorm.doctor.evidence.model import probe_model

        evidence, run = probe_model(unwrapped(self.model), optimizer=self._optimizer), self.run()
        remarks, late = evidence.remarks, max((t.readings for t in run.trends.values()), default=0)
        if not self.steps:
            remarks = (*remarks, "No training forward of the model was seen, so none was read.")
        elif late < ENOUGH:
            remarks = (
                *remarks,
                f"The second half of the run has {late} of the {ENOUGH} finite readings that most "
                f"rules need: monitor more steps, or with a smaller `every`.",
            )
        evidence = replace(evidence, run=run, remarks=remarks)
        return judge(evidence, select=select, ignore=ignore)

    def to_html(self, path: str | Path) -> Path:
        """Write the report as a page, with charts over the run."""
        return self.report().to_html(path)

    def record(self) -> dict[str, Any]:
        """The readings as plain dicts, for JSON: NaN is None, infinity is "inf" or "-inf"."""

        def plain(value: Any) -> Any:
            if not isinstance(value, float) or isfinite(value):
                return value
            return None if isnan(value) else str(value)

        return {
            "steps": self.steps,
            "every": self.every,
            "readings": [
                {name: plain(value) for name, value in reading._asdict().items()}
                for reading in self.readings
            ],
        }

    # While the model runs -----------------------------------------------------------------------

    def begin_step(self) -> None:
        """A step begins. For a loop that never calls the model as a whole, instead of `start`."""
        self._disarm()  # where the step before was left by an exception
        self._settle()  # its backward is over
        step, self.steps = self.steps, self.steps + 1
        if step % self.every:
            return
        set_stance = getattr(torch.compiler, "set_stance", None)  # torch 2.6
        if "torch._dynamo" in sys.modules and set_stance is not None:
            self._stance = set_stance("force_eager")  # compiled parts would call no hooks
        for name, part in self._norms():
            self._arm(name, part, step)

    def end_step(self) -> None:
        """The forward of a step is over."""
        self._disarm()

    def _norms(self) -> Iterator[tuple[str, nn.Module]]:
        parts = unwrapped(self.model).named_modules()
        return ((name, part) for name, part in parts if recognize(part) is not None)

    def _counts(self) -> dict[str, int]:
        """How many batches each layer has counted."""
        counts = ((n, getattr(part, "num_batches_tracked", None)) for n, part in self._norms())
        return {name: int(count) for name, count in counts if count is not None}

    def _before(self, model: nn.Module, _: Any) -> None:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        if not model.training:
            self._on_layers.append(model.register_forward_hook(OwnHook(self._after_inference)))
            return
        self.begin_step()
        # A hook costs time at every call, so this one is there only when it has work.
        if self._on_layers or self._stance is not None:
            after = OwnHook(lambda *_: self.end_step())
            self._on_layers.append(model.register_forward_hook(after, always_call=True))

    def _after_inference(self, _: nn.Module, __: Any, output: Any) -> None:
        """Counts the forward if a gradient is computed through it: it was meant to train."""
        self._disarm()
        differentiable = next((t for t in tensors(output) if t.requires_grad), None)
        if differentiable is None:
            return

        def count(_: Tensor) -> None:
            self._in_inference += 1

        differentiable.register_hook(count)

    def _arm(self, name: str, layer: nn.Module, step: int) -> None:
        calls: list[NormCall] = []

        def before(part: nn.Module, args: Any, kwargs: Any) -> None:
            norm = recognize(part)
            if norm is None or is_recomputation():
                return
            if pending := NormCall.begin(norm, part, args, kwargs, name, step):
                calls.append(pending)
                self._pending.append(pending)

        def after(part: nn.Module, _: Any, output: Any) -> None:
            if calls and isinstance(output, Tensor):
                calls.pop().end(output, getattr(part, "activation", None))

        self._on_layers += [
            layer.register_forward_pre_hook(OwnHook(before), with_kwargs=True),
            layer.register_forward_hook(OwnHook(after)),
        ]

    def _disarm(self) -> None:
        for handle in self._on_layers:
            handle.remove()
        self._on_layers = []
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None

    def _settle(self) -> None:
        """Numbers out of tensors, now that the step is over."""
        pending, self._pending = self._pending, []
        if not pending:  # in every step that is not read: nothing may be searched here
            return
        for call in pending:
            by_channel = call.by_channel()
            reading = by_channel.reading(call.layer, call.saturated(), call.gradient())
            self._by_channel.setdefault(call.layer, deque(maxlen=WINDOW)).append(by_channel)
            for write in self._writers:
                write(reading)
            if reading.nonfinite:
                self._first_nonfinite.setdefault(call.layer, reading.step)
            if self._stays(reading):
                self._readings.append(reading)
        if len({r.step for r in self._readings if r.step % self._stride == 0}) > STEPS_IN_MEMORY:
            self._stride *= 2
            self._readings = [reading for reading in self._readings if self._stays(reading)]

    def _stays(self, reading: Reading) -> bool:
        """One in so many steps, and each layer's first with NaN or infinity."""
        on_stride = reading.step % self._stride == 0
        return on_stride or reading.step == self._first_nonfinite.get(reading.layer)

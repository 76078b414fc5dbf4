"""`monitor` in Lightning's and Hugging Face's Trainer, and in Keras's `fit`.

Each function makes a callback; its `watch` is a `Monitor` once training has begun. With `page`, the
report is written there when training ends, also when an exception ends it (Lightning).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


class _Monitored:
    """What the callbacks do."""

    watch: Any = None

    def __init__(self, every: int, to: Any, page: str | Path | None) -> None:
        self._every, self._to, self._page = every, to, page

    def _begin(self, model: Any, optimizer: Any) -> None:
        from steadynorm.doctor.monitoring import Monitor

        self.watch = Monitor(model, self._every, to=self._to, optimizer=optimizer)

    def _end(self, *_: Any, **__: Any) -> None:
        if self.watch is not None:
            if hasattr(self.watch, "stop"):
                self.watch.stop()
            if self._page is not None:
                self.watch.report().to_html(self._page)


def lightning_callback(
    every: int = 50, *, to: Any = (), page: str | Path | None = None
) -> Any:  # a lightning.pytorch.Callback
    """A callback for `lightning.Trainer(callbacks=[...])`; the arguments are those of `monitor`.

    Raises ModuleNotFoundError where neither lightning nor pytorch_lightning is installed.
    """
    try:
        from lightning.pytorch import Callback  # type: ignore[import-not-found, unused-ignore]
    except ModuleNotFoundError:
        from pytorch_lightning import Callback  # type: ignore[import-not-found, unused-ignore]

    class LightningMonitor(_Monitored, Callback):  # type: ignore[misc, unused-ignore]
        """See `lightning_callback`."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self._begin(pl_module, list(trainer.optimizers))

        # `training_step` need not call the module as a whole, so the batch is the step.
        def on_train_batch_start(self, *_: Any) -> None:
            self.watch.begin_step()

        def on_train_batch_end(self, *_: Any) -> None:
            self.watch.end_step()

        on_train_end = on_exception = _Monitored._end

    return LightningMonitor(every, to, page)


def trainer_callback(
    every: int = 50, *, to: Any = (), page: str | Path | None = None
) -> Any:  # a transformers.TrainerCallback
    """A callback for `transformers.Trainer(callbacks=[...])`; the arguments are those of `monitor`.

    With `torch_compile=True` the Trainer runs compiled code that no hook of the model sees, and
    nothing is read.
    """
    from transformers import TrainerCallback

    class TrainerMonitor(_Monitored, TrainerCallback):
        """See `trainer_callback`. The Trainer tells nobody of an exception, so hooks are there for
        the forward that follows alone.
        """

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._begin(kwargs["model"], kwargs.get("optimizer"))

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.watch.next_forward()

        on_substep_end = on_step_begin  # of accumulated gradients: another forward follows
        on_train_end = _Monitored._end

    return TrainerMonitor(every, to, page)


def keras_callback(
    every: int = 50, *, to: Any = (), page: str | Path | None = None
) -> Any:  # a keras.callbacks.Callback
    """A callback for `model.fit(..., callbacks=[...])`, on any backend; the arguments are those of
    `monitor`.

    What reaches a layer is worked out from its moving statistics before and after a step, so that
    `dead`, `saturated` and `gradient` are not known, and a layer that trains with other statistics
    than Keras's own is not read.
    """
    import keras

    from steadynorm.doctor.keras_monitoring import KerasMonitor
    from steadynorm.doctor.writers import writers

    class KerasCallback(_Monitored, keras.callbacks.Callback):  # type: ignore[misc, unused-ignore]
        """See `keras_callback`."""

        def __init__(self) -> None:
            _Monitored.__init__(self, every, to, page)
            keras.callbacks.Callback.__init__(self)

        def on_train_begin(self, logs: Any = None) -> None:
            self.watch = KerasMonitor(self.model, every, writers(to))

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            self.watch.begin_step()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.watch.end_step()

        on_train_end = _Monitored._end

    return KerasCallback()

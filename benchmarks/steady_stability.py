"""When does a remembered gradient keep a channel's scale, and when does the scale run away?

    python benchmarks/steady_stability.py

One channel, batches of one, reduced to what closes the loop. State: the logarithm of the scale of
the channel's weights, the running variance, the remembered slope R, and SGD's momentum. `step`
is one SGD step over `SAMPLES` samples, each normalized alone:

    q  = E[x̂²] = (1 - k)·r/(1 + k·r)          r = scale²/running_var, k = 1/(1 + prior)
    s  = E[g·x̂] = tanh(log(q/q₀)/2)            the loss wants q = q₀, where r = 1
    running_var ← running_var + (scale² - running_var)/(1 + horizon)

and one of three rules for R and for the gradient that reaches the scale, all with rate
β = 1/(1 + window):

    one-way       (1 - k)·s
    average       R ← R + β·(s - R)                                      (1 - k)·(s - q·R)
    regression    R ← ((1 - β)·R + β·(1 - k)·s)/(1 - β + β·q)            (1 - k)·s - q·R

"average" subtracts x̂ times the mean of g·x̂, as in the backward of a large batch, where E[x̂²] is 1.
"regression" is what `Steady` does. `rate` is the learning rate over the squared norm of the
channel's weights, times γ; the number of positions enters nowhere else.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from datetime import datetime, timezone
from typing import NamedTuple

import numpy as np

from steadynorm.report.machine import processor

Array = np.ndarray

SAMPLES = 64  # in one SGD step
MOMENTUM = 0.9
PRIOR = 16.0
WINDOWS = (4, 16, 32, 64, 256)
HORIZONS = (128, 256, 640)
RATES = (0.03, 0.1, 0.3)
KICKS = np.geomspace(0.02, 3, 40)  # of the logarithm of the scale
STEPS = 400


class Setting(NamedTuple):
    """What the loop depends on."""

    prior: float
    horizon: float
    window: float
    rate: float


class State(NamedTuple):
    """Channels, or one channel after different kicks."""

    log_scale: Array
    log_running: Array
    remembered: Array
    velocity: Array


Rule = Callable[[Array, Array, Array, float, float], tuple[Array, Array]]


def one_way(s: Array, q: Array, remembered: Array, k: float, beta: float) -> tuple[Array, Array]:
    """Only the share's part of the gradient."""
    return 0 * remembered, (1 - k) * s


def average(s: Array, q: Array, remembered: Array, k: float, beta: float) -> tuple[Array, Array]:
    """R averages g·x̂."""
    remembered = remembered + beta * (s - remembered)
    return remembered, (1 - k) * (s - q * remembered)


def regression(s: Array, q: Array, remembered: Array, k: float, beta: float) -> tuple[Array, Array]:
    """R regresses g on x̂."""
    left = (1 - k) * s
    remembered = ((1 - beta) * remembered + beta * left) / (1 - beta + beta * q)
    return remembered, left - q * remembered


RULES: dict[str, Rule] = {"one-way": one_way, "average": average, "regression": regression}


def at_rest(kick: Array | float = 0.0) -> State:
    """The fixed point, with the scale kicked away from it."""
    kicked = np.atleast_1d(np.asarray(kick, dtype=float))
    return State(kicked, np.zeros_like(kicked), np.zeros_like(kicked), np.zeros_like(kicked))


def step(state: State, rule: Rule, setting: Setting) -> State:
    """One SGD step of `SAMPLES` samples."""
    k, beta = 1 / (1 + setting.prior), 1 / (1 + setting.window)
    forward = 1 / (1 + setting.horizon)
    at_optimum = (1 - k) / (1 + k)
    square, running = np.exp(2 * state.log_scale), np.exp(state.log_running)
    remembered, gradient = state.remembered, np.zeros_like(square)
    for _ in range(SAMPLES):
        r = square / running
        q = (1 - k) * r / (1 + k * r)
        s = np.tanh(np.log(q / at_optimum) / 2)
        remembered, passed = rule(s, q, remembered, k, beta)
        gradient = gradient + passed / SAMPLES
        running = running + forward * (square - running)
    velocity = MOMENTUM * state.velocity + gradient
    log_scale = np.clip(state.log_scale - setting.rate * velocity, -20, 20)
    return State(log_scale, np.log(running), remembered, velocity)


def decay(rule: Rule, setting: Setting, distance: float = 1e-6) -> float:
    """The largest eigenvalue of the linearized step, in absolute value.

    Without the eigenvalue 1 that is always there: scale and running standard deviation may move
    together, since the layer normalizes by the latter.
    """
    rest = np.zeros(4)

    def after(values: Array) -> Array:
        return np.concatenate(step(State(*(np.array([v]) for v in values)), rule, setting))

    columns = [
        (after(rest + distance * unit) - after(rest - distance * unit)) / (2 * distance)
        for unit in np.eye(4)
    ]
    found = np.linalg.eigvals(np.stack(columns, axis=1))
    return float(np.abs(np.delete(found, np.abs(found - 1).argmin())).max())


def smallest_lost_kick(rule: Rule, setting: Setting) -> float:
    """The smallest kick after which the scale goes on growing; infinite if none does."""
    state = at_rest(KICKS)
    for _ in range(STEPS):
        state = step(state, rule, setting)
    lost = np.abs(state.log_scale) > np.maximum(2 * KICKS, 1)
    return float(KICKS[lost].min()) if lost.any() else float("inf")


def table(title: str, value: Callable[[Rule, Setting], str]) -> None:
    """Rules and windows down, rates and horizons along a row."""
    columns = [(rate, horizon) for rate in RATES for horizon in HORIZONS]
    print(f"{title}\n")
    print("| rule | window | " + " | ".join(f"{r:g}, {h}" for r, h in columns) + " |")
    print("|---" * (2 + len(columns)) + "|")
    rows = [("one-way", 1)] + [(rule, w) for rule in ("average", "regression") for w in WINDOWS]
    for rule, window in rows:
        cells = [value(RULES[rule], Setting(PRIOR, h, window, r)) for r, h in columns]
        shown = "" if rule == "one-way" else window
        print(f"| {rule} | {shown} | " + " | ".join(cells) + " |", flush=True)
    print()


def lost_factor(rule: Rule, setting: Setting) -> str:
    """The smallest kick as a factor of the scale."""
    kick = smallest_lost_kick(rule, setting)
    return "none" if kick == np.inf else f"{np.exp(kick):.2f}"


def main() -> None:
    """Print both tables."""
    today = datetime.now(timezone.utc).date()
    print(f"Prior {PRIOR:g}, {SAMPLES} samples a step, momentum {MOMENTUM};")
    print(f"columns: rate, horizon; {today}, {processor()}, NumPy {np.__version__},")
    print(f"Python {platform.python_version()}.\n")
    table(
        "Largest eigenvalue of the linearized step: below 1, small deviations die out.",
        lambda rule, setting: f"{decay(rule, setting):.3f}",
    )
    table("Smallest factor of the scale, in one kick, after which it runs away.", lost_factor)


if __name__ == "__main__":
    main()

"""A batch-normalized LSTM in float64 NumPy, forwards and backwards in time."""

from typing import Any

import numpy as np
import torch
from tests import truth

import steadynorm as sn

INPUT, HIDDEN, TIME, SAMPLES = 3, 4, 5, 7
NORMS = ("input_norm", "hidden_norm", "cell_norm")


def made(policy: Any = "batch", **settings: Any) -> Any:
    """A float64 network with parameters and statistics that are nowhere 0 or 1."""
    torch.manual_seed(3)
    settings = {"max_length": TIME, "dtype": torch.float64, **settings}
    network: Any = sn.BatchNormLSTM(INPUT, HIDDEN, statistics=policy, **settings)
    with torch.no_grad():
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            if name.endswith("var"):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point():
                tensor.normal_()
            else:
                tensor.fill_(4)
    return network


def sequences(samples: int = SAMPLES, time: int = TIME) -> torch.Tensor:
    random = torch.Generator().manual_seed(11)
    return torch.randn(time, samples, INPUT, generator=random, dtype=torch.float64)


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy().copy()


class Norm:
    """One normalization's parameters and its statistics for every step."""

    def __init__(self, norm: Any, eps: float = 1e-5) -> None:
        bias = None if norm.bias is None else array(norm.bias)
        self.setting = truth.Setting(array(norm.weight), bias, eps=eps)
        self.policy = norm.steps[0].statistics
        self.training = norm.training
        self.running = [
            truth.Running(array(s.running_mean), array(s.running_var), int(s.num_batches_tracked))
            for s in norm.steps
        ]

    def step(self, x: np.ndarray, time: int, grad: Any = None, running: Any = None) -> Any:
        """A step's result; for a gradient `running` is what the forward met."""
        at = min(time, len(self.running) - 1)
        before = self.running[at] if running is None else running
        if not self.training:
            return truth.infer(x, before, self.setting, grad=grad), before
        result = truth.train(x, self.policy, before, self.setting, grad=grad)
        if grad is None:
            self.running[at] = result.running
        return result, before


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


class Truth:
    """A cell over (T, N, I), the sequences' lengths given; `lengths` may be in any order."""

    def __init__(self, cell: Any) -> None:
        self.w_x, self.w_h = array(cell.weight_ih), array(cell.weight_hh)
        self.bias = array(cell.bias)
        self.norms = {name: Norm(getattr(cell, name)) for name in NORMS}

    def forward(self, x: np.ndarray, lengths: list[int], h: Any = None, c: Any = None) -> Any:
        n = x.shape[1]
        self.x, self.trace = x, []
        h = np.zeros((n, HIDDEN)) if h is None else h
        c = np.zeros((n, HIDDEN)) if c is None else c
        outputs = np.zeros((len(x), n, HIDDEN))
        for time in range(len(x)):
            rows = [i for i in range(n) if lengths[i] > time]
            from_x = x[time, rows] @ self.w_x.T
            from_h = h[rows] @ self.w_h.T
            a, met_x = self.norms["input_norm"].step(from_x, time)
            b, met_h = self.norms["hidden_norm"].step(from_h, time)
            i, f, g, o = np.split(a.y + b.y + self.bias, 4, 1)
            i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
            kept = (rows, from_x, from_h, h[rows].copy(), c[rows].copy(), (i, f, g, o))
            h, c = h.copy(), c.copy()
            c[rows] = f * kept[4] + i * g
            s, met_c = self.norms["cell_norm"].step(c[rows], time)
            h[rows] = o * np.tanh(s.y)
            self.trace.append((*kept, c[rows].copy(), np.tanh(s.y), met_x, met_h, met_c))
            outputs[time, rows] = h[rows]
        return outputs, h, c

    def backward(self, grad: np.ndarray, dh: np.ndarray, dc: np.ndarray) -> dict[str, Any]:
        """Gradients of input and parameters for those of outputs and last states."""
        found: dict[str, Any] = {"x": np.zeros_like(self.x), "bias": 0.0}
        found |= dict.fromkeys(("weight_ih", "weight_hh", "cell_norm.bias"), 0.0)
        found |= {f"{name}.weight": 0.0 for name in NORMS}
        dh, dc = dh.copy(), dc.copy()
        for time in reversed(range(len(self.x))):
            rows, from_x, from_h, h, c, (i, f, g, o), c_new, s, *met = self.trace[time]
            up = dh[rows] + grad[time, rows]
            norm = self.norms["cell_norm"]
            inner, _ = norm.step(c_new, time, up * o * (1 - s * s), met[2])
            found["cell_norm.weight"] += inner.dweight
            found["cell_norm.bias"] += inner.dbias
            to_c = dc[rows] + inner.dx
            gates = (to_c * g * i * (1 - i), to_c * c * f * (1 - f), to_c * i * (1 - g * g))
            d_gates = np.concatenate([*gates, up * s * o * (1 - o)], 1)
            found["bias"] += d_gates.sum(0)
            to_x, _ = self.norms["input_norm"].step(from_x, time, d_gates, met[0])
            to_h, _ = self.norms["hidden_norm"].step(from_h, time, d_gates, met[1])
            found["input_norm.weight"] += to_x.dweight
            found["hidden_norm.weight"] += to_h.dweight
            found["weight_ih"] += to_x.dx.T @ self.x[time, rows]
            found["weight_hh"] += to_h.dx.T @ h
            found["x"][time, rows] = to_x.dx @ self.w_x
            dh[rows], dc[rows] = to_h.dx @ self.w_h, to_c * f
        return found | {"h": dh, "c": dc}

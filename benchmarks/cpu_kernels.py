"""The CPU kernels on the shapes of ResNet-50 against eager PyTorch, `copy_` and memory's limit.

    python benchmarks/cpu_kernels.py [--last] [--case bn|relu|add] [--shapes 0,3] [--bf16]

Times are medians of interleaved runs, as multiples of `y.copy_(x)` in the same run. `given` is with
outputs given; the other columns pay for their results' memory. Limit: bytes over copy's bandwidth.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
from torch.nn import functional as F

from steadynorm.kernels import cpu

SHAPES = [
    (32, 64, 112, 112), (32, 64, 56, 56), (32, 256, 56, 56), (32, 128, 56, 56), (32, 128, 28, 28),
    (32, 512, 28, 28), (32, 256, 28, 28), (32, 256, 14, 14), (32, 1024, 14, 14), (32, 512, 14, 14),
    (32, 512, 7, 7), (32, 2048, 7, 7),
]  # fmt: skip


def contenders(shape, last, case, dtype):
    memory = torch.channels_last if last else torch.contiguous_format

    def new():
        return torch.randn(shape).to(dtype).contiguous(memory_format=memory)

    x, residual, grad, y, dx, dresidual = (new() for _ in range(6))
    weight, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    activation = None if case == "bn" else "relu"
    add = residual if case == "add" else None
    n = x.numel() // shape[1]
    _, moments = cpu.normalize(x, weight, bias, 1e-5, residual=add, activation=activation, out=y)
    rho = (moments.var + 1e-5).rsqrt()
    scale = rho * weight
    shift = bias - moments.mean_low * scale
    rest = (scale * rho * rho / n, scale / n, moments.mean_low, moments.mean_low)
    options = {"activation": activation, "want_residual": case == "add"}

    def forward(out=None):
        return cpu.normalize(x, weight, bias, 1e-5, residual=add, activation=activation, out=out)

    def backward(out=None):
        saved = y if activation else None
        return cpu.normalize_grad(
            grad, x, moments.mean, scale, shift, *rest, y=saved, out=out, **options
        )

    def both():
        result = forward()
        gradients = backward()
        return result, gradients

    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
    leaves = [t.detach().clone().requires_grad_() for t in (x, residual)]
    parameters = [t.clone().requires_grad_() for t in (weight, bias)]

    def peer(training=True, leaves=leaves, parameters=parameters):
        z = F.batch_norm(leaves[0], mean, var, *parameters, training)
        if case == "add":
            z = z + leaves[1]
        return z if case == "bn" else F.relu(z)

    def peer_both():
        z = peer()
        z.backward(grad)
        for t in (*leaves, *parameters):
            t.grad = None

    def peer_inference():
        with torch.no_grad():
            peer(False)

    def inference():
        return cpu.apply(x, mean, scale, shift, residual=add, activation=activation)

    return {
        "copy": lambda: dx.copy_(x),
        "fwd given": lambda: forward(y),
        "bwd given": lambda: backward((dx, dresidual if case == "add" else None)),
        "both": both,
        "eager": peer_both,
        "inference": inference,
        "eager inference": peer_inference,
    }


def measure(functions, seconds=1.5):
    """Median seconds of each. One thread is timed by its own clock: other programs do not count."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["copy"]) < 5:
        for name, function in functions.items():
            start = clock()
            function()
            times[name].append(clock() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--last", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--case", default="add", choices=["bn", "relu", "add"])
    parser.add_argument("--shapes", default=",".join(map(str, range(len(SHAPES)))))
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    moved = {"bn": (1.0, 1.5), "relu": (1.0, 2.0), "add": (1.5, 2.5)}[options.case]
    print(f"{options.case}, {'NHWC' if options.last else 'NCHW'}, limit {moved[0]} / {moved[1]}")
    print(
        f"{'shape':>20} {'copy ms':>8} {'fwd':>6} {'bwd':>6} {'both':>6} {'eager':>6} {'×':>5}"
        f" {'infer':>6} {'eager':>6} {'×':>5}"
    )
    gains, inference_gains = [], []
    for index in map(int, options.shapes.split(",")):
        shape = SHAPES[index]
        dtype = torch.bfloat16 if options.bf16 else torch.float32
        t = measure(contenders(shape, options.last, options.case, dtype), options.seconds)
        c = t["copy"]
        gains.append(t["eager"] / t["both"])
        inference_gains.append(t["eager inference"] / t["inference"])
        label = ",".join(map(str, shape))
        names = ("fwd given", "bwd given", "both", "eager")
        training = " ".join(f"{t[name] / c:6.2f}" for name in names)
        inference = " ".join(f"{t[name] / c:6.2f}" for name in ("inference", "eager inference"))
        print(
            f"{label:>20} {c * 1e3:8.2f} {training} {gains[-1]:5.2f} {inference} "
            f"{inference_gains[-1]:5.2f}",
            flush=True,
        )
    for name, values in (("training", gains), ("inference", inference_gains)):
        mean = math.exp(statistics.mean(map(math.log, values)))
        print(f"{name}: geometric mean {mean:.2f}, least {min(values):.2f}")


if __name__ == "__main__":
    main()

"""The commands `steadynorm bench` and `steadynorm warmup`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from steadynorm._extras import require
from steadynorm.command import GroupBars, Json, errors_in_one_line, print_json, say
from steadynorm.files import check_writable


def _words(value: str, allowed: tuple[str, ...], option: str) -> list[str]:
    words = [word.strip() for word in value.split(",") if word.strip()]
    for word in words:
        if word not in allowed:
            raise ValueError(
                f"{option} must be a comma-separated list of {', '.join(allowed)}; got {word!r}."
            )
    return words


def bench(
    suites: Annotated[
        str, typer.Option(help="resnet50, unet3d, mlp, small, networks.")
    ] = "resnet50,networks",
    cases: Annotated[str, typer.Option(help="bn, bn+relu, bn+add+relu.")] = "bn,bn+add+relu",
    layouts: Annotated[str, typer.Option(help="nchw, nhwc.")] = "nchw,nhwc",
    dtypes: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32",
    modes: Annotated[str, typer.Option(help="training, inference.")] = "training,inference",
    contenders: Annotated[
        str,
        typer.Option(
            help="ours, given (our CPU kernels, outputs given), eager, compile, jax, "
            "graph and eager_graph (as CUDA graphs)."
        ),
    ] = "ours,given,eager",
    device: Annotated[str, typer.Option(help="cpu, or an accelerator: cuda, xpu.")] = "cpu",
    kernels: Annotated[
        str, typer.Option(help="On a device: operator (PyTorch's), or gpu (our Triton kernels).")
    ] = "operator",
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds.")] = 9,
    shapes: Annotated[str, typer.Option(help="Only shapes with these numbers, from 0.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for bench.csv, .json and .html.")] = Path(
        "bench"
    ),
    json: Json = False,
) -> None:
    """Time the layer against its peers and against a plain copy of the tensor."""
    with errors_in_one_line("bench"):
        require("torch", *(["numba"] if device == "cpu" else []))
        from steadynorm.evidence.bench.clock import check_device
        from steadynorm.evidence.bench.contenders import CONTENDERS, available
        from steadynorm.evidence.bench.measure import Measurement, machine, measure
        from steadynorm.evidence.bench.networks import NETWORKS, PACKAGES, measure_networks
        from steadynorm.evidence.bench.results import tables, to_record, write
        from steadynorm.evidence.bench.workloads import CASES, DTYPES, LAYOUTS, SUITES, workloads
        from steadynorm.kernels import use
        from steadynorm.report.terminal import to_rich

        check_device(device)
        check_writable(out / "bench.json")
        if kernels not in ("operator", "gpu"):
            raise ValueError(f"--kernels must be operator or gpu; got {kernels!r}.")
        wanted = _words(suites, (*SUITES, "networks"), "--suites")
        if "networks" in wanted and not all(map(find_spec, PACKAGES)):
            raise ValueError(
                f"--suites networks needs {' and '.join(PACKAGES)}: pip install "
                f"{' '.join(PACKAGES)}, or name other suites, such as --suites resnet50."
            )
        asked = _words(contenders, tuple(CONTENDERS), "--contenders")
        names = available(asked, device)
        if left_out := [name for name in asked if name not in names]:
            say(f"left out, not for {device} or not installed: {', '.join(left_out)}", stderr=True)
        numbers = tuple(str(number) for number in range(max(map(len, SUITES.values()))))
        picked = [int(number) for number in _words(shapes, numbers, "--shapes")]
        loads = [
            load
            for load in workloads(
                [suite for suite in wanted if suite != "networks"],
                _words(cases, CASES, "--cases"),
                _words(layouts, LAYOUTS, "--layouts"),
                _words(dtypes, DTYPES, "--dtypes"),
                _words(modes, ("training", "inference"), "--modes"),
            )
            if names and (not picked or SUITES[load.suite].index(load.shape) in picked)
        ]
        if not loads and "networks" not in wanted:
            raise ValueError("what is asked for leaves nothing to measure.")
        use("gpu", on=kernels == "gpu")
        found: list[Measurement] = []
        networks = None
        # Drawn between measurements: a thread that draws would take a core from what is timed.
        with GroupBars(auto_refresh=False) as bars:
            if loads:
                bars.begin("kernels", len(loads) * rounds)
                for load in loads:
                    found += measure(load, names, rounds, lambda: bars.step("kernels"), device)
            if "networks" in wanted:
                bars.begin("networks", len(NETWORKS))
                networks = measure_networks(rounds, lambda: bars.step("networks"), device)
        about = machine(device)
        paths = write(out, found, about, networks)
        if json:
            print_json(to_record(found, about, networks))
            return
        for table in [*tables(found), *([networks] if networks is not None else [])]:
            Console().print(to_rich(table))
        say(", ".join(f"{key} {value}" for key, value in about.items()))
        for path in paths:
            say(f"wrote {path}")


def warmup(
    dtypes: Annotated[str, typer.Option(help="float32, float64, bfloat16, float16.")] = "float32",
    activations: Annotated[str, typer.Option(help="none, relu, silu, ...")] = "none,relu",
    json: Json = False,
) -> None:
    """Compile the CPU kernels ahead, so that the first training step does not."""
    with errors_in_one_line("warmup", "what was compiled stays on disk."):
        import time

        import torch

        from steadynorm.kernels.activations import ACTIVATIONS
        from steadynorm.kernels.cpu import kernels
        from steadynorm.kernels.cpu.readable import name_of

        kinds = _words(dtypes, tuple(map(name_of, kernels.SCALARS)), "--dtypes")
        names = _words(activations, ("none", *ACTIVATIONS), "--activations")
        start = time.perf_counter()
        with Console(stderr=True).status("compiling"):
            done = kernels.warmup(
                [getattr(torch, kind) for kind in kinds],
                [None if name == "none" else name for name in names],
            )
        ready = sum(kernel.cached for kernel in done.values())
        took = round(time.perf_counter() - start, 1)
        if json:
            print_json({"kernels": len(done), "from_cache": ready, "seconds": took})
            return
        say(f"{len(done)} kernels ready, {ready} of them from the disk cache, in {took} s.")

"""The commands `steadynorm convert` and `steadynorm fold`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(help="package.module:factory, called without arguments.")]
Weights = Annotated[
    Path | None, typer.Option(help="A state dict to load: .safetensors, or a .pt of tensors only.")
]
Data = Annotated[
    Path | None,
    typer.Option(help="Example inputs, to check by: .npy, .npz, .safetensors or .pt."),
]
Out = Annotated[Path | None, typer.Option(help="Where to write the state dict: .safetensors, .pt.")]


def convert(
    model: Model,
    weights: Weights = None,
    data: Data = None,
    out: Out = None,
    statistics: Annotated[
        str | None, typer.Option(help="Policy for every layer, such as steady; none keeps each.")
    ] = None,
    fuse: Annotated[bool, typer.Option(help="Take in activations and residuals.")] = True,
    to: Annotated[str, typer.Option(help="steadynorm or torch.")] = "steadynorm",
) -> None:
    """Turn every batch norm of a model into ours, and say what changed."""
    from steadynorm.models.surgery.conversion import convert as convert_model

    with _Told():
        loaded, example_inputs = _load(model, weights, data)
        result, changes = convert_model(
            loaded, statistics, fuse, to=to, example_inputs=example_inputs, inplace=True
        )
        typer.echo(changes)
        _write(result, out)


def fold(
    model: Model,
    weights: Weights = None,
    data: Data = None,
    out: Out = None,
    onnx: Annotated[
        Path | None, typer.Option(help="Also export to this file, checked with onnxruntime.")
    ] = None,
) -> None:
    """Merge batch norms into their neighbours, for inference, and say what changed."""
    from steadynorm.models.surgery.folding import fold as fold_model

    with _Told():
        loaded, example_inputs = _load(model, weights, data)
        if onnx is not None and example_inputs is None:
            raise ValueError("--onnx needs --data, example inputs to export and check with.")
        result, changes = fold_model(loaded.eval(), example_inputs)
        typer.echo(changes)
        _write(result, out)
        if onnx is not None:
            from steadynorm.models.surgery.onnx import export_onnx

            export_onnx(result, example_inputs, onnx)
            typer.echo(f"wrote {onnx}; onnxruntime answers the same")


class _Told:
    """Turns an error about the arguments into one line and exit code 2."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, ValueError | TypeError | RuntimeError | OSError):
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error


def _load(model: str, weights: Path | None, data: Path | None) -> tuple[Any, Any]:
    from steadynorm.models.surgery.files import load_model, load_weights, read_data

    loaded = load_model(model)
    if weights is not None:
        load_weights(loaded, weights)
    return loaded, None if data is None else read_data(data)


def _write(model: Any, out: Path | None) -> None:
    if out is not None:
        from steadynorm.models.surgery.files import write_weights

        write_weights(model.state_dict(), out)
        typer.echo(f"wrote {out}")

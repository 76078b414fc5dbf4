"""The commands `convert`, `fold`, `calibrate` and `convert-weights`.

Heavy imports stay inside, so that `--help` is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from steadynorm.command import errors_in_one_line

# typer reads these at run time, where Python 3.10 needs Optional.
Model = Annotated[str, typer.Argument(help="package.module:factory, called without arguments.")]
Weights = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="A state dict to load: .safetensors, or a .pt of tensors only."),
]
Data = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Example inputs, to check by: .npy, .npz, .safetensors or .pt."),
]
Batches = Annotated[
    str,
    typer.Option(
        help="package.module:batches, an iterable of batches or a function that makes one."
    ),
]
Out = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Where to write the state dict: .safetensors or .pt."),
]


def convert(
    model: Model,
    weights: Weights = None,
    data: Data = None,
    out: Out = None,
    statistics: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Policy for every layer, such as steady; none keeps each."),
    ] = None,
    fuse: Annotated[bool, typer.Option(help="Fuse activations and residuals.")] = True,
    to: Annotated[str, typer.Option(help="steadynorm or torch.")] = "steadynorm",
) -> None:
    """Turn every batch norm of a model into ours, and say what changed."""
    from steadynorm.models.convert import convert as convert_model
    from steadynorm.statistics import policy_from

    with errors_in_one_line("convert"):
        policy = None if statistics is None else policy_from(statistics)
        loaded, example_inputs = _load(model, weights), _example(data)
        result, changes = convert_model(
            loaded, policy, fuse, to=to, example_inputs=example_inputs, inplace=True
        )
        typer.echo(changes)
        _write(result, out)


def fold(
    model: Model,
    weights: Weights = None,
    data: Data = None,
    out: Out = None,
    onnx: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Also export to this file, checked with onnxruntime."),
    ] = None,
) -> None:
    """Merge batch norms into their neighbours, for inference, and say what changed."""
    from steadynorm.models.fold import fold as fold_model

    with errors_in_one_line("fold"):
        loaded, example_inputs = _load(model, weights), _example(data)
        if onnx is not None and example_inputs is None:
            raise ValueError("--onnx needs --data, example inputs to export and check with.")
        result, changes = fold_model(loaded.eval(), example_inputs)
        typer.echo(changes)
        _write(result, out)
        if onnx is not None:
            from steadynorm.models.onnx import export_onnx

            export_onnx(result, example_inputs, onnx)
            typer.echo(f"wrote {onnx}; onnxruntime answers the same")


def calibrate(
    model: Model,
    data: Batches,
    weights: Weights = None,
    out: Out = None,
    passes: Annotated[
        str, typer.Option(help="one, or layerwise: one pass per layer, exact for any batch size.")
    ] = "one",
    max_batches: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Stop after so many batches."),
    ] = None,
    prior: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Adapt instead: samples that the model's own statistics count for."),
    ] = None,
) -> None:
    """Replace a model's running statistics by those of its data, and say how far they were off."""
    from steadynorm.models import calibrate as functions

    with errors_in_one_line("calibrate"):
        network, batches = _load(model, weights), batches_from(data)
        options: dict[str, Any] = {"passes": passes, "max_batches": max_batches}
        if prior is None:
            report = functions.calibrate(network, batches, **options)
        else:
            report = functions.adapt(network, batches, prior=prior, **options)
        typer.echo(report)
        _write(network, out)


def convert_weights(
    source_file: Annotated[Path, typer.Argument(help="torch, Keras or flax checkpoint.")],
    target_file: Annotated[Path, typer.Argument(help="A .safetensors or .npz file to write.")],
    source: Annotated[str, typer.Option(help="torch, keras or flax.")],
    target: Annotated[str, typer.Option(help="torch, keras or flax.")],
    values_per_channel: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=1, help="Values per channel in a training batch (N·H·W): the variance's factor."
        ),
    ] = None,
    count_batches: Annotated[
        bool, typer.Option("--count-batches", help="Keep num_batches_tracked everywhere.")
    ] = False,
) -> None:
    """Rename a checkpoint's batch normalization weights for another framework."""
    from steadynorm.models import checkpoints, files

    with errors_in_one_line("convert-weights"):
        values, remarks = checkpoints.convert_weights(
            files.read(source_file),
            source,
            target,
            values_per_channel=values_per_channel,
            count_batches=count_batches,
        )
        files.write(values, target_file)
        typer.echo(f"{len(values)} arrays written to {target_file}")
        for remark in remarks:
            typer.echo(remark)


def load_model(spec: str) -> Any:
    """The model made by `package.module:factory`, called without arguments.

    The current folder is searched too. Raises ValueError for a malformed or unknown name, TypeError
    if what is made is no model.

    >>> load_model("torch.nn:Identity")
    Identity()
    """
    from torch import nn

    made = named_by(spec, "MODEL")
    model = made if isinstance(made, nn.Module) else made()
    if not isinstance(model, nn.Module):
        raise TypeError(f"MODEL must make a torch.nn.Module; {spec} made {type(model).__name__}.")
    return model


def batches_from(spec: str, option: str = "--data") -> Any:
    """What `package.module:name` is, or makes when called; the current folder is searched too."""
    found = named_by(spec, option)
    return found() if callable(found) else found


def named_by(spec: str, option: str) -> Any:
    """What `package.module:name` names. Raises ValueError where there is no such thing."""
    import sys
    from pkgutil import resolve_name

    if not all(spec.partition(":")):
        raise ValueError(f"{option} must be package.module:name; got {spec!r}.")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return resolve_name(spec)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{option} {spec!r} cannot be found: {error}.") from error


def _load(model: str, weights: Path | None) -> Any:
    from steadynorm.models.files import load_weights

    loaded = load_model(model)
    if weights is not None:
        load_weights(loaded, weights)
    return loaded


def _example(data: Path | None) -> Any:
    from steadynorm.models.files import read_data

    return None if data is None else read_data(data)


def _write(model: Any, out: Path | None) -> None:
    if out is not None:
        from steadynorm.models.files import write

        write(model.state_dict(), out)
        typer.echo(f"wrote {out}")

"""The commands `convert`, `fold`, `calibrate` and `convert-weights`.

Heavy imports stay inside, so that `--help` is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from steadynorm.command import Json, errors_in_one_line, print_json, show

MODEL = "package.module:factory, or a call with literals: \"timm.create_model('resnet18')\"."
DATA = (
    "Batches: package.module:batches, an iterable or a function that makes one; or a file that "
    "holds one: .npy, .npz, .safetensors, .pt."
)
Model = Annotated[str, typer.Argument(help=MODEL)]
Weights = Annotated[
    Path | None, typer.Option(help="A state dict to load: .safetensors, or a .pt of tensors only.")
]
Example = Annotated[str | None, typer.Option(help=f"{DATA} The first is what to check by.")]
Batches = Annotated[str, typer.Option(help=DATA)]
Out = Annotated[
    Path | None, typer.Option(help="Where to write the state dict: .safetensors or .pt.")
]


def convert(
    model: Model,
    weights: Weights = None,
    data: Example = None,
    statistics: Annotated[
        str | None, typer.Option(help="Policy for every layer, such as steady; none keeps each.")
    ] = None,
    fuse: Annotated[bool, typer.Option(help="Fuse activations and residuals.")] = True,
    to: Annotated[str, typer.Option(help="steadynorm or torch.")] = "steadynorm",
    json: Json = False,
) -> None:
    """Say what sn.convert would change of a model, checked on data. The weights stay the same."""
    from steadynorm.models import named
    from steadynorm.models.convert import convert as convert_model
    from steadynorm.statistics import policy_from

    with errors_in_one_line("convert"):
        policy = None if statistics is None else policy_from(statistics)
        loaded = _load(model, weights)
        given = named.example(data, loaded)
        _, changes = convert_model(loaded, policy, fuse, to=to, example_inputs=given, inplace=True)
        show(changes, json=json)


def fold(
    model: Model,
    weights: Weights = None,
    data: Example = None,
    out: Out = None,
    onnx: Annotated[
        Path | None, typer.Option(help="Also export to this file, checked with onnxruntime.")
    ] = None,
    json: Json = False,
) -> None:
    """Merge batch norms into their neighbours, for inference, and say what changed."""
    from steadynorm.files import check_writable
    from steadynorm.models import named
    from steadynorm.models.files import check_out
    from steadynorm.models.fold import fold as fold_model

    with errors_in_one_line("fold"):
        check_out(out)
        if onnx is not None:
            check_writable(onnx)
        loaded = _load(model, weights)
        example_inputs = named.example(data, loaded)
        if onnx is not None and example_inputs is None:
            raise ValueError("--onnx needs --data, example inputs to export and check with.")
        result, changes = fold_model(loaded.eval(), example_inputs)
        show(changes, json=json)
        _write(result, out, json)
        if onnx is not None:
            from steadynorm.models.onnx import export_onnx

            export_onnx(result, example_inputs, onnx)
            typer.echo(f"wrote {onnx}; onnxruntime answers the same", err=json)


def calibrate(
    model: Model,
    data: Batches,
    weights: Weights = None,
    out: Out = None,
    passes: Annotated[
        str, typer.Option(help="one, or layerwise: one pass per layer, exact for any batch size.")
    ] = "one",
    max_batches: Annotated[int | None, typer.Option(help="Stop after so many batches.")] = None,
    prior: Annotated[
        float | None,
        typer.Option(help="Adapt instead: samples that the model's own statistics count for."),
    ] = None,
    json: Json = False,
) -> None:
    """Replace a model's running statistics by those of its data, and say how far they were off."""
    from steadynorm.models import calibrate as functions
    from steadynorm.models import named
    from steadynorm.models.files import check_out

    with errors_in_one_line("calibrate"):
        check_out(out)
        network = _load(model, weights)
        batches = named.batches(data, network)
        options: dict[str, Any] = {"passes": passes, "max_batches": max_batches}
        if prior is None:
            report = functions.calibrate(network, batches, **options)
        else:
            report = functions.adapt(network, batches, prior=prior, **options)
        show(report, json=json)
        _write(network, out, json)


def convert_weights(
    source_file: Annotated[Path, typer.Argument(help="torch, Keras or flax checkpoint.")],
    target_file: Annotated[Path, typer.Argument(help="A .safetensors or .npz file to write.")],
    source: Annotated[str, typer.Option(help="torch, keras or flax.")],
    target: Annotated[str, typer.Option(help="torch, keras or flax.")],
    values_per_channel: Annotated[
        int | None,
        typer.Option(
            min=1, help="Values per channel in a training batch (N·H·W): the variance's factor."
        ),
    ] = None,
    count_batches: Annotated[
        bool, typer.Option("--count-batches", help="Keep num_batches_tracked everywhere.")
    ] = False,
    json: Json = False,
) -> None:
    """Rename a checkpoint's batch normalization weights for another framework."""
    from steadynorm.models import checkpoints, files

    with errors_in_one_line("convert-weights"):
        if target_file.resolve() == source_file.resolve():
            raise ValueError(
                f"TARGET_FILE must be another file than SOURCE_FILE, whose other arrays would be "
                f"lost; got {target_file} for both."
            )
        files.check_out(target_file)
        values, remarks = checkpoints.convert_weights(
            files.read(source_file),
            source,
            target,
            values_per_channel=values_per_channel,
            count_batches=count_batches,
        )
        files.write(values, target_file)
        if json:
            print_json({"arrays": len(values), "file": str(target_file), "remarks": remarks})
            return
        typer.echo(f"{len(values)} arrays written to {target_file}")
        for remark in remarks:
            typer.echo(remark)


def _load(model: str, weights: Path | None) -> Any:
    from steadynorm.models import named
    from steadynorm.models.files import load_weights

    loaded = named.model(model)
    if weights is not None:
        load_weights(loaded, weights)
    return loaded


def _write(model: Any, out: Path | None, json: bool) -> None:
    if out is not None:
        from steadynorm.models.files import write

        write(model.state_dict(), out)
        typer.echo(f"wrote {out}", err=json)

"""The command `steadynorm calibrate`; heavy imports stay inside, so that `--help` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer


def calibrate(
    model: Annotated[str, typer.Argument(help="package.module:factory, called without arguments.")],
    data: Annotated[
        str,
        typer.Option(
            help="package.module:batches, an iterable of batches or a function that makes one."
        ),
    ],
    weights: Annotated[
        Optional[Path],  # noqa: UP045  typer reads it at run time
        typer.Option(help="A state dict to load: .safetensors, or a .pt of tensors only."),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Where to write the calibrated state dict: .safetensors or .pt."),
    ] = None,
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
    try:
        report, wrote = _calibrate(model, data, weights, out, passes, max_batches, prior)
    except (ValueError, TypeError, OSError) as error:
        typer.echo(f"steadynorm calibrate: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("steadynorm calibrate: interrupted; nothing was written.", err=True)
        raise typer.Exit(130) from None
    typer.echo(report)
    if wrote is not None:
        typer.echo(f"wrote {wrote}")


def _calibrate(
    model: str,
    data: str,
    weights: Path | None,
    out: Path | None,
    passes: Any,
    max_batches: int | None,
    prior: float | None,
) -> tuple[Any, Path | None]:
    from steadynorm.models.calibration.functions import adapt
    from steadynorm.models.calibration.functions import calibrate as replace
    from steadynorm.models.surgery.files import load_model, load_weights, write_weights

    network = load_model(model)
    if weights is not None:
        load_weights(network, weights)
    batches = batches_from(data)
    if prior is None:
        report = replace(network, batches, passes=passes, max_batches=max_batches)
    else:
        report = adapt(network, batches, prior=prior, passes=passes, max_batches=max_batches)
    if out is not None:
        write_weights(network.state_dict(), out)
    return report, out


def batches_from(spec: str, option: str = "--data") -> Any:
    """What `package.module:name` is, or makes when called; the current folder is searched too."""
    found = named_by(spec, option)
    return found() if callable(found) else found


def named_by(spec: str, option: str) -> Any:
    """What `package.module:name` names. Raises ValueError where there is no such thing."""
    from pkgutil import resolve_name

    if ":" not in spec:
        raise ValueError(f"{option} must be package.module:name; got {spec!r}.")
    try:
        return resolve_name(spec)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{option} {spec!r} cannot be found: {error}.") from error

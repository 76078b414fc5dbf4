"""The command `steadynorm convert-weights`. Heavy imports stay inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console


def convert_weights(
    source_file: Annotated[Path, typer.Argument(help="torch, Keras or flax checkpoint.")],
    target_file: Annotated[Path, typer.Argument(help="A .safetensors or .npz file to write.")],
    source: Annotated[str, typer.Option(help="torch, keras or flax.")],
    target: Annotated[str, typer.Option(help="torch, keras or flax.")],
    values_per_channel: Annotated[
        Optional[int],  # noqa: UP045  typer reads it at run time
        typer.Option(
            min=1, help="Values per channel in a training batch (N·H·W): the variance's factor."
        ),
    ] = None,
    count_batches: Annotated[
        bool, typer.Option("--count-batches", help="Keep num_batches_tracked everywhere.")
    ] = False,
) -> None:
    """Rename a checkpoint's batch normalization weights for another framework."""
    from steadynorm.models import checkpoints

    def say(text: str, error: bool = False) -> None:
        console = Console(stderr=error)
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    try:
        values, remarks = checkpoints.convert_weights(
            checkpoints.read(source_file),
            source,
            target,
            values_per_channel=values_per_channel,
            count_batches=count_batches,
        )
        checkpoints.write(values, target_file)
    except (OSError, ValueError) as error:
        say(f"steadynorm convert-weights: {error}", error=True)
        raise typer.Exit(2) from None
    say(f"{len(values)} arrays written to {target_file}")
    for remark in remarks:
        say(remark)

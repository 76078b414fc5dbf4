"""The command `steadynorm doctor`. What imports torch, rich or jinja2 is imported inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from steadynorm._extras import lacking
from steadynorm.command import Json, echo_json, errors_in_one_line, print_json
from steadynorm.doctor.diagnosis import Report, diagnose
from steadynorm.doctor.finding import Severity
from steadynorm.doctor.rules import all_rules, find_rule
from steadynorm.doctor.rules.pages import plain
from steadynorm.files import check_writable, replace_file
from steadynorm.models._cli import DATA, MODEL

FORMATS = ("text", "json", "sarif", "html")
NEVER = "never"

# typer reads these at run time, where Python 3.10 needs Optional.
Name = Optional[str]  # noqa: UP045
File = Optional[Path]  # noqa: UP045
Codes = Optional[list[str]]  # noqa: UP045
Count = Optional[int]  # noqa: UP045
TARGET = (
    f"{MODEL[:-1]}; or a checkpoint file alone: .pt, .pth, .ckpt, .bin (tensors only), "
    ".safetensors, .npz, .h5, .keras."
)
AGAINST = "Other batches, those that the model will meet, named as --data is."
LOSS = "package.module:function of (outputs, targets), say torch.nn.functional:mse_loss."
OPTIMIZER = "package.module:function of (model) that makes the optimizer."
SELECT = "Only these rules: codes, their beginnings, or names; commas join them."
OUT = "With --fix, where to write the copy's weights: .safetensors or .pt."


def doctor(
    target: Annotated[Name, typer.Argument(help=TARGET)] = None,
    weights: Annotated[
        File, typer.Option(help="A state dict to load into the model: .safetensors, or .pt.")
    ] = None,
    data: Annotated[Name, typer.Option(help=DATA)] = None,
    against: Annotated[Name, typer.Option(help=AGAINST)] = None,
    loss: Annotated[Name, typer.Option(help=LOSS)] = None,
    optimizer: Annotated[Name, typer.Option(help=OPTIMIZER)] = None,
    max_batches: Annotated[Count, typer.Option(min=1, help="Stop after so many batches.")] = None,
    exporting: Annotated[
        bool, typer.Option("--exporting", help="The model is about to be exported as it is.")
    ] = False,
    select: Annotated[Codes, typer.Option(help=SELECT)] = None,
    ignore: Annotated[Codes, typer.Option(help="Not these rules, likewise.")] = None,
    fail_on: Annotated[
        str, typer.Option(help="Exit with 1 at this severity: info, warning, error; or never.")
    ] = "warning",
    output_format: Annotated[
        str, typer.Option("--format", help="text, json, sarif or html.")
    ] = "text",
    json: Json = False,
    output: Annotated[File, typer.Option(help="Write the report to this file instead.")] = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Apply the safe cures to a copy, and look again.")
    ] = False,
    out: Annotated[File, typer.Option(help=OUT)] = None,
    list_rules: Annotated[bool, typer.Option("--list", help="Name every rule.")] = False,
    explain: Annotated[
        Name, typer.Option(metavar="CODE", help="Say what a rule sees, why, and what to do.")
    ] = None,
) -> None:
    """Find what is wrong with a network's batch norms, and say what to do.

    Exit codes: 0 nothing found at or above --fail-on, 1 something was, 2 could not run.
    """
    with errors_in_one_line("doctor"):
        if list_rules or explain is not None:
            _tell(explain, json)
            return
        output_format = "json" if json else output_format
        _check(target, output_format, fail_on, fix, out, output)
        asked: dict[str, Any] = {"select": _split(select), "ignore": _split(ignore)}
        named = {"data": data, "against": against, "loss": loss, "optimizer": optimizer}
        try:
            report, changes = _diagnose(
                str(target), weights, named, max_batches, exporting, asked, fix, out
            )
        except (ValueError, TypeError, OSError):
            raise
        except Exception as error:  # a model, its data and its loss may raise anything
            if lacking(error):
                raise
            raise ValueError(f"{type(error).__name__}: {error}") from error
        if changes:
            typer.echo(changes, err=output_format != "text" and output is None)
        _show(report, output_format, output)
    worst = report.worst
    if fail_on != NEVER and worst is not None and worst >= Severity.from_name(fail_on):
        raise typer.Exit(1)


def _check(
    target: str | None,
    output_format: str,
    fail_on: str,
    fix: bool,
    out: Path | None,
    output: Path | None,
) -> None:
    if target is None:
        raise ValueError("TARGET must name a model (package.module:factory) or a checkpoint file.")
    if output_format not in FORMATS:
        raise ValueError(f"--format must be one of {', '.join(FORMATS)}; got {output_format!r}.")
    if fail_on != NEVER:
        try:
            Severity.from_name(fail_on)
        except ValueError:
            raise ValueError(
                f"--fail-on must be info, warning, error or {NEVER}; got {fail_on!r}."
            ) from None
    if out is not None and not fix:
        raise ValueError("--out writes what --fix mended; give --fix too.")
    from steadynorm.models.files import check_out

    check_out(out)
    if output is not None:
        check_writable(output)


def _split(codes: list[str] | None) -> tuple[str, ...]:
    return tuple(code.strip() for part in codes or () for code in part.split(",") if code.strip())


def _is_model(target: str) -> bool:
    """`package.module:factory` is a model; no file is, nor a path with a drive's letter."""
    from steadynorm.models.files import READERS

    called = "(" in target or (":" in target and Path(target).suffix not in READERS)
    return called and not Path(target).exists()


def _diagnose(
    target: str,
    weights: Path | None,
    named: dict[str, str | None],
    max_batches: int | None,
    exporting: bool,
    asked: dict[str, Any],
    fix: bool,
    out: Path | None,
) -> tuple[Report, str]:
    """The report, after the cures if they were asked for, and what these changed."""
    if not _is_model(target):
        options: dict[str, object] = {f"--{name}": value for name, value in named.items()}
        options |= {"--weights": weights, "--max-batches": max_batches}
        refused = [name for name, value in options.items() if value is not None]
        refused += ["--fix"] * fix + ["--exporting"] * exporting
        if refused:
            raise ValueError(
                f"{', '.join(refused)} needs a model (package.module:factory); {target!r} is a "
                f"checkpoint alone."
            )
        return diagnose(target, **asked), ""

    from steadynorm.models import named as names
    from steadynorm.models.files import load_weights

    model = names.model(target)
    if weights is not None:
        load_weights(model, weights)
    data, against, loss, optimizer = named.values()
    given_to: dict[str, Any] = {
        "loss": None if loss is None else names.thing(loss, "--loss"),
        "against": None if against is None else names.batches(against, model, "--against"),
        "max_batches": max_batches,
        "optimizer": None if optimizer is None else names.thing(optimizer, "--optimizer")(model),
        "exporting": exporting,
        "name": target,
        **asked,
    }
    batches = None if data is None else names.batches(data, model)
    report = diagnose(model, batches, **given_to)
    if not fix:
        return report, ""
    from steadynorm.doctor.fixes import fix as mend

    fixed = mend(model, report, batches, **given_to)
    wrote = ""
    if out is not None:
        fixed.write(out)
        wrote = f"\nwrote {out}"
    return fixed.after, f"{fixed.changes}{wrote}\n"


def _show(report: Report, output_format: str, output: Path | None) -> None:
    if output_format == "text" and output is None:
        from rich.console import Console

        from steadynorm.doctor.report.text import show

        show(report, Console())
        return

    def html() -> str:
        from steadynorm.doctor.report.html import page

        return page(report).html()

    made = {"text": report.__str__, "json": report.to_json, "sarif": report.to_sarif, "html": html}
    text = made[output_format]()
    if output is None and output_format in ("json", "sarif"):
        echo_json(text)
    elif output is None:
        typer.echo(text, nl=not text.endswith("\n"))
    else:
        replace_file(output, text)
        typer.echo(f"wrote {output}")


def _tell(explain: str | None, json: bool) -> None:
    """A rule's page, or the list of rules."""
    if explain is not None:
        rule = find_rule(explain)
        if json:
            print_json({"code": rule.code, "name": rule.name, "page": plain(rule)})
        else:
            typer.echo(plain(rule))
        return
    names = ("code", "name", "severity", "needs", "summary")
    rules = [{name: str(getattr(rule, name)) for name in names} for rule in all_rules()]
    if json:
        print_json(rules)
        return
    rows = [[*row.values()] for row in ({**r, "severity": f"up to {r['severity']}"} for r in rules)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        typer.echo("  ".join([*cells, row[4]]))

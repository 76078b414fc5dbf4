"""The reports' tables in the terminal."""

from __future__ import annotations

from rich.table import Table as RichTable
from rich.text import Text

from steadynorm.report.page import Table


def to_rich(table: Table) -> RichTable:
    """A `Table` as rich prints it. Cells are text, never markup."""
    shown = RichTable(
        title=Text(table.title), title_justify="left", title_style="bold", caption_justify="left"
    )
    if table.note:
        shown.caption = Text(table.note)
    for index, column in enumerate(table.columns):
        shown.add_column(Text(column), justify="right" if table.numeric(index) else "left")
    for index, row in enumerate(table.rows):
        style = "bold" if index in table.emphasis else None
        shown.add_row(*(Text(table.text(cell)) for cell in row), style=style)
    return shown

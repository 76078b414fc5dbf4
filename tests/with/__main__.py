"""`python -m tests.with`: the table of tools, written into docs/with/index.md."""

from importlib import import_module  # `with` is a keyword, so no import statement can name it
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "with" / "index.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"

if __name__ == "__main__":
    tools = import_module("tests.with.tools")
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    table = tools.table(rest)
    PAGE.write_text(before + BEGIN + table + END + rest.split(END)[1], encoding="utf-8")
    print(table)

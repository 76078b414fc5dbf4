"""`python -m steadynorm` is the command line."""

from steadynorm.cli import app

app(prog_name="python -m steadynorm")

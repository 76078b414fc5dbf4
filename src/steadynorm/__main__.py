"""`python -m steadynorm` is the command `steadynorm`."""

from steadynorm.cli import app

if __name__ == "__main__":
    app()

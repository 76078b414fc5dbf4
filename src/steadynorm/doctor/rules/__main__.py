"""`python -m steadynorm.doctor.rules [docs/rules]` writes the rules' pages."""

import sys
from pathlib import Path

from steadynorm.doctor.rules.pages import write

if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/rules"))

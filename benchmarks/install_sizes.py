"""What each extra brings: the built wheel installed with it in an empty environment.

    python benchmarks/install_sizes.py [EXTRA ...]

Prints the table of docs/install.md. Needs pip's registry; versions are those of constraints.txt, so
that torch is the build that this machine's pip takes for the pinned version.
"""

import datetime as dt
import platform
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("", "gpu", "torch", "jax", "keras", "lab", "onnx", "all")
NAMED = 6  # of the packages an extra brings, the largest


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)


def sizes(wheel: Path, extra: str, folder: Path) -> dict[str, float]:
    """MB of each distribution in an environment that held nothing else."""
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    target = f"{wheel}[{extra}]" if extra else str(wheel)
    constraints = ("--constraint", str(ROOT / "constraints.txt"))
    pip("--python", str(python), "install", "--quiet", *constraints, target)
    ask = (
        "from importlib.metadata import distributions\n"
        "for d in distributions():\n"
        "    paths = [d.locate_file(f) for f in d.files or ()]\n"
        "    size = sum(p.stat().st_size for p in paths if p.is_file())\n"
        "    print(d.metadata['Name'], size)"
    )
    listed = subprocess.run([str(python), "-c", ask], check=True, capture_output=True, text=True)
    pairs = (line.split() for line in listed.stdout.splitlines())
    return {name: int(size) / 1e6 for name, size in pairs}


def main() -> None:
    """Install, measure, and print a row for each extra."""
    asked = sys.argv[1:] or EXTRAS
    with tempfile.TemporaryDirectory() as scratch:
        pip("wheel", "--quiet", "--no-deps", "--wheel-dir", scratch, str(ROOT))
        [wheel] = Path(scratch).glob("steadynorm-*.whl")
        base = sizes(wheel, "", Path(scratch) / "base")
        print("| `pip install` | packages | MB | the largest it adds, MB |")
        print("|---|---:|---:|---|")
        for extra in asked:
            found = sizes(wheel, extra, Path(scratch) / extra) if extra else base
            added = {n: mb for n, mb in found.items() if n not in base} if extra else found
            largest = sorted(added, key=lambda name: -added[name])[:NAMED]
            name = f'"steadynorm[{extra}]"' if extra else "steadynorm"
            shown = ", ".join(f"{package} {added[package]:.0f}" for package in largest)
            print(f"| `{name}` | {len(found)} | {sum(found.values()):.0f} | {shown} |", flush=True)
    where = f"{platform.system()} {platform.machine()}"
    print(f"\n{dt.date.today()}, Python {platform.python_version()}, {where}")


if __name__ == "__main__":
    main()

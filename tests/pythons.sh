#!/usr/bin/env bash
# The wheel in an empty environment of the oldest and the newest Python that the package claims: the
# statistics, the errors that name an extra, and every file compiled. No framework is installed.
# A Python that is not on this machine is named and left out.
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

found=0
for version in 3.10 3.13; do
    export PYENV_VERSION=$version # where pyenv has it; others take no notice
    if ! "python$version" -m venv "$scratch/$version" 2>/dev/null; then
        echo "Python $version: not on this machine, left out"
        continue
    fi
    found=$((found + 1))
    python=$scratch/$version/bin/python
    "$python" -m pip install --quiet . pytest hypothesis
    "$python" -m compileall -q src
    "$python" -m pytest -q -p no:cacheprovider --confcutdir=tests/statistics \
        tests/statistics tests/test_extras.py
done
[ "$found" -gt 0 ] || echo "neither was found; nothing was tested"

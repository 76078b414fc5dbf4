"""Other Python processes for tests: with another environment, and as a user without an account."""

import functools
import os
import shutil
import subprocess
import sys
import textwrap

import pytest

STRANGER = 54321
"""No user of this machine."""

# Reads all files, for the interpreter itself may lie in a home; writes none but its own.
BECOME = (
    "setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups",
    "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search",
)  # fmt: skip

as_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away"
)


@functools.cache
def can_become() -> bool:
    """Whether this process can start others as `STRANGER`."""
    if shutil.which(BECOME[0]) is None:
        return False
    return subprocess.run([*BECOME, "true"], capture_output=True, check=False).returncode == 0


as_a_stranger = pytest.mark.skipif(
    not can_become(), reason="takes root and setpriv to become a user without an account"
)


def run(code, *, stranger=False, without=(), **environment):
    """What the code prints, in words; `without` are variables that it does not get."""
    kept = {name: value for name, value in os.environ.items() if name not in without}
    done = subprocess.run(
        [*(BECOME if stranger else ()), sys.executable, "-c", textwrap.dedent(code)],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()

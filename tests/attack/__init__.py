"""The standing attack on what `docs/promises.md` promises: `python -m tests.attack --help`.

One attack is one module of this folder that has `TITLE`, one line for the table, and
`cases(rng, long)`, which yields named trials. A trial is called without arguments, holds if it
returns and has broken a promise if it raises. All that is random comes from `rng`.
"""

"""From estimates to a verdict: findings, and the one rule by which they decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from steadynorm.evidence.estimates import Estimate

Outcome = Literal["supported", "not supported here", "mixed", "undecided"]


@dataclass(frozen=True)
class Finding:
    """One thing that the rule asks for, such as `expected` "above 2". `holds` is "yes" where the
    whole interval lies there, "no" where none of it does, and "open" otherwise.
    """

    words: str
    estimate: Estimate
    expected: str
    holds: Literal["yes", "no", "open"]


def expect(
    words: str, estimate: Estimate, *, above: float | None = None, below: float | None = None
) -> Finding:
    """The finding that the estimate lies above a bound, below one, or between two. A single seed
    leaves it open.

    >>> expect("times fewer steps", Estimate(3.0, 2.5, 3.5, 5), above=2).holds
    'yes'
    >>> expect("times fewer steps", Estimate(3.0, 1.5, 4.5, 5), above=2).holds
    'open'
    """
    low = float("-inf") if above is None else above
    high = float("inf") if below is None else below
    bounds = [f"{side} {bound:g}" for side, bound in (("above", above), ("below", below))
              if bound is not None]  # fmt: skip
    if not bounds:
        raise ValueError("expect: `above` or `below` must be given; got neither.")
    if estimate.seeds < 2:
        holds: Literal["yes", "no", "open"] = "open"
    elif low < estimate.low and estimate.high < high:
        holds = "yes"
    elif estimate.high <= low or high <= estimate.low:
        holds = "no"
    else:
        holds = "open"
    return Finding(words, estimate, " and ".join(bounds), holds)


@dataclass(frozen=True)
class Verdict:
    """What the runs say about the claim. The first finding is the main one."""

    outcome: Outcome
    sentence: str
    findings: Sequence[Finding]

    @property
    def seeds(self) -> int:
        """The fewest seeds behind a finding."""
        return min(finding.estimate.seeds for finding in self.findings)

    def record(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "outcome": self.outcome,
            "sentence": self.sentence,
            "seeds": self.seeds,
            "findings": [
                {"words": f.words, "expected": f.expected, "holds": f.holds, **f.estimate._asdict()}
                for f in self.findings
            ],
        }


def judge(sentence: str, findings: Sequence[Finding]) -> Verdict:
    """The verdict by the one rule of the lab: all findings seen is "supported", none of them "not
    supported here", some seen and some not "mixed"; with one left open it is "undecided", unless
    another one already failed.
    """
    holds = {finding.holds for finding in findings}
    if not holds:
        raise ValueError("judge: `findings` must hold at least one finding; got none.")
    if holds == {"yes"}:
        outcome: Outcome = "supported"
    elif "no" not in holds:
        outcome = "undecided"
    elif "yes" in holds:
        outcome = "mixed"
    else:
        outcome = "not supported here"
    return Verdict(outcome, sentence, list(findings))

"""Part of the run was trained in inference mode.

After a validation that calls eval() and never train() again, batch norms normalize by running
statistics that no longer move, dropout drops nothing, and the rest of the run fine-tunes a network
with frozen batch norms. Nothing says so: the loss goes on falling.

When: A gradient was computed through at least 10 forwards of the model in inference mode, and they
are more than a tenth of all. A model that is in inference mode throughout is left alone: that is a
way to fine-tune. A warning.

Cure: Call model.train() after every validation.

Code: model.train()

Source: Documentation of torch.nn.Module.eval; pytorch/pytorch issue 4741.
"""

from __future__ import annotations

from steadynorm.doctor.rules.rule import WARNING, Evidence, Findings, Rule

rule = Rule(__name__, __doc__, WARNING, safe=False, explains=("SN402",))


@rule.whole
def _check(evidence: Evidence) -> Findings:
    run = evidence.run
    if run is None or not run.steps or run.in_inference < 10:
        return
    total = run.steps + run.in_inference
    if run.in_inference > 0.1 * total:
        yield rule.finding(
            None,
            f"{run.in_inference} of {total} forwards that a gradient was computed through were in "
            f"inference mode",
            {"in_inference": run.in_inference, "in_training": run.steps},
        )

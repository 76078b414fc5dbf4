"""What the rules judge: plain numbers and words, gathered once from a checkpoint, model or run.

The records are in `records.py` and `training.py`. They import no framework, so that rules can judge
a checkpoint of any of them.
"""

from steadynorm.doctor.evidence.records import (
    HALF,
    Evidence,
    LossByMode,
    ModelData,
    ModelFacts,
    Neighbour,
    NormData,
    NormEvidence,
    NormState,
    NormUsage,
    Padding,
    Saturation,
    WeightGradient,
)

__all__ = [
    "HALF",
    "Evidence",
    "LossByMode",
    "ModelData",
    "ModelFacts",
    "Neighbour",
    "NormData",
    "NormEvidence",
    "NormState",
    "NormUsage",
    "Padding",
    "Saturation",
    "WeightGradient",
]

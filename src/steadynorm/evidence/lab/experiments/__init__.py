"""The experiments, one claim in one file. To add one, name its file here."""

from __future__ import annotations

from importlib import import_module

from steadynorm.evidence.lab.experiment import Experiment

NAMES = (
    "convergence",
    "learning_rate_range",
    "initialization",
    "depth_and_saturation",
    "covariate_shift",
    "smoothness",
    "regularization_by_noise",
    "small_batches",
    "steady_parts",
    "batch_of_one",
    "training_against_inference",
    "shifted_data",
    "bias",
    "running_average_in_training",
    "before_or_after",
    "recurrent",
    "cost",
)


def get(name: str) -> Experiment:
    """The experiment of a name: `learning_rate_range` or `learning-rate-range`.

    Raises ValueError for a name that is not there.
    """
    module = name.replace("-", "_")
    if module not in NAMES:
        known = ", ".join(name.replace("_", "-") for name in NAMES)
        raise ValueError(f"get: `name` must be one of {known}; got {name!r}.")
    experiment: Experiment = import_module(f"{__name__}.{module}").EXPERIMENT
    return experiment


def every() -> list[Experiment]:
    """All experiments, in the order of the report."""
    return [get(name) for name in NAMES]

"""Channel-sized mathematics of batch normalization, written once for every array library.

Nothing here imports a framework. The functions use operators, and where a function of the array
library is needed it is taken from `xp`: `numpy`, `torch`, `jax.numpy` or `keras.ops`.
"""

from steadynorm.statistics.gradient_memory import GradientMemory, remember, with_memory
from steadynorm.statistics.moments import Moments, contribution, merge, pool
from steadynorm.statistics.normalizer import (
    Coefficients,
    GradientCoefficients,
    GradientFactors,
    Normalizer,
    attach,
    coefficients,
    fold,
    gradient_coefficients,
    gradient_factors,
    of_batch,
    of_running,
    parameter_gradients,
)
from steadynorm.statistics.policies import (
    Batch,
    Context,
    Frozen,
    Ghost,
    Policy,
    PolicyName,
    Renorm,
    Running,
    Steady,
    policy_from,
)
from steadynorm.statistics.running import (
    CONVENTIONS,
    MANY_BATCHES,
    Convention,
    RunningStatistics,
    batches_seen,
    convert_momentum,
    convert_variance,
    new_batch_weight,
    update_average,
)
from steadynorm.statistics.step import step, usable

__all__ = [
    "CONVENTIONS",
    "MANY_BATCHES",
    "Batch",
    "Coefficients",
    "Context",
    "Convention",
    "Frozen",
    "Ghost",
    "GradientCoefficients",
    "GradientFactors",
    "GradientMemory",
    "Moments",
    "Normalizer",
    "Policy",
    "PolicyName",
    "Renorm",
    "Running",
    "RunningStatistics",
    "Steady",
    "attach",
    "batches_seen",
    "coefficients",
    "contribution",
    "convert_momentum",
    "convert_variance",
    "fold",
    "gradient_coefficients",
    "gradient_factors",
    "merge",
    "new_batch_weight",
    "of_batch",
    "of_running",
    "parameter_gradients",
    "policy_from",
    "pool",
    "remember",
    "step",
    "update_average",
    "usable",
    "with_memory",
]

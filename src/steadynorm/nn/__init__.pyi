# What type checkers see: ours first, since the first of two equal names counts, then torch.nn's.
from steadynorm.nn import functional as functional
from steadynorm.nn.batchnorm import BatchNorm1d as BatchNorm1d
from steadynorm.nn.batchnorm import BatchNorm2d as BatchNorm2d
from steadynorm.nn.batchnorm import BatchNorm3d as BatchNorm3d
from steadynorm.nn.batchnorm import LazyBatchNorm1d as LazyBatchNorm1d
from steadynorm.nn.batchnorm import LazyBatchNorm2d as LazyBatchNorm2d
from steadynorm.nn.batchnorm import LazyBatchNorm3d as LazyBatchNorm3d
from steadynorm.nn.recurrent import BatchNormLSTM as BatchNormLSTM
from steadynorm.nn.recurrent import BatchNormLSTMCell as BatchNormLSTMCell

from torch.nn import *  # type: ignore[assignment, no-redef]  # isort: skip  # noqa: F403

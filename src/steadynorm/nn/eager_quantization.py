"""What `torch.ao.quantization.fuse_modules` does with our layers.

It looks the types of the modules up in a table that holds torch's own. So for each row with one of
torch's batch norms `register` adds one with ours: in inference torch's own function puts it into
the layer before it; elsewhere an error says what to do. Rows of torch's types stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


def register(ours: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Adds rows with our layers, given by torch's that they stand for."""
    try:
        from torch.ao.quantization import fuser_method_mappings as torchs
    except ImportError:  # deprecated: it may go
        return
    table: Any = getattr(torchs, "_DEFAULT_OP_LIST_TO_FUSER_METHOD", {})
    for types, fuser in list(table.items()):
        row = tuple(ours.get(kind, kind) for kind in types)
        if row != types:
            table.setdefault(row, _fuser(fuser, goes_into_another=types[0] not in ours))


def _fuser(torchs: Callable[..., Any], *, goes_into_another: bool) -> Callable[..., Any]:
    def fuser(is_qat: bool, *modules: nn.Module) -> Any:
        training = is_qat or any(module.training for module in modules)
        if goes_into_another and not training:
            return torchs(is_qat, *modules)
        given = ", ".join(type(module).__name__ for module in modules)
        raise RuntimeError(
            f"fuse_modules: steadynorm's batch norms are fused in inference, into the layer before "
            f"them; got {given}, in {'training' if training else 'inference'}. Use model.eval() "
            f'and sn.fold, or for training with quantization sn.convert(model, to="torch") first.'
        )

    return fuser

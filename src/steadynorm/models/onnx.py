"""Export a model to ONNX, and check what onnxruntime makes of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steadynorm.files import replacing
from steadynorm.models.equivalence import answers, compare
from steadynorm.models.graph import tensors


def export_onnx(model: nn.Module, example_inputs: Any, path: Path) -> None:
    """Writes a model in inference as one ONNX file, once onnxruntime answers as torch does.

    The file replaces an older one only after it has been run on the example inputs and its answers
    compared with the model's; the axes have the sizes of the example inputs.

    Arguments:
        model: in inference.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        path: the file to write.

    Raises RuntimeError if the answers differ; whatever `torch.onnx.export` raises for a model that
    it cannot export.
    """
    import onnxruntime

    expected = answers(model, example_inputs, training=False)
    named = isinstance(example_inputs, Mapping)
    args = () if named else tuple(tensors([example_inputs]))
    kwargs = dict(example_inputs) if named else None
    with replacing(path) as beside:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how the exporter itself is written
            torch.onnx.export(
                model, args, beside, kwargs=kwargs, dynamo=True, external_data=False, verbose=False
            )
        session = onnxruntime.InferenceSession(beside, providers=["CPUExecutionProvider"])
        given = list(tensors(example_inputs))
        feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), given, strict=True)}
        got = [torch.from_numpy(array) for array in session.run(None, feeds)]
        compare(expected, got, "onnx")

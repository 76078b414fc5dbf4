"""ExecuTorch, OpenVINO and PT2E quantization, which the `dev` extra does not bring.

pip install executorch openvino torchao
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import steadynorm as sn

from .case import WARNS, X, case, close, ours, refusal, theirs


def _both() -> list[Any]:
    return [ours(), sn.fold(ours())[0]]


@case("ExecuTorch", "portable and XNNPACK, folded or not", "executorch")
def _() -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    for partitioner in ([], [XnnpackPartitioner()]):
        for network in _both():
            program = torch.export.export(network, (X,))
            lowered = to_edge_transform_and_lower(program, partitioner=partitioner).to_executorch()
            method = Runtime.get().load_program(lowered.buffer).load_method("forward")
            close(method.execute([X])[0], theirs()(X))


@case("OpenVINO", "from a model or an export, folded or not", "openvino")
def _() -> None:
    import openvino

    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    for network in _both():
        program = torch.export.export(network, (X,))
        for given in (
            openvino.convert_model(program),
            openvino.convert_model(network, example_input=X),
        ):
            run = openvino.compile_model(given, "CPU", exact)
            close(torch.from_numpy(run(X.numpy())[0].copy()), theirs()(X))


# --- PT2E


def _plain() -> Any:
    """Without the activation that `Block` calls twice, which torchao's quantizer refuses."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        for _ in range(30):
            network(X)
    return network


def _quantized(network: Any, *, training: bool) -> Tensor:
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import (
        convert_pt2e,
        prepare_pt2e,
        prepare_qat_pt2e,
    )
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=training))
    exported: Any = torch.export.export(copy.deepcopy(network).train(training), (X,)).module()
    prepared = (prepare_qat_pt2e if training else prepare_pt2e)(exported, quantizer)
    for _ in range(3):
        prepared(X)
    quantized = convert_pt2e(prepared)
    if training:
        move_exported_model_to_eval(quantized)
    answer: Tensor = quantized(X)
    return answer


@case("PT2E quantization", "after training, folded or not", "torchao")
def _() -> None:
    expected = _quantized(_plain(), training=False)
    close(expected, _plain().eval()(X), 0.05)
    for network in (
        sn.convert(_plain(), statistics="steady")[0],
        sn.fold(_plain().eval())[0],
    ):
        close(_quantized(network, training=False), expected)


def _trained_quantized(statistics: Any) -> None:
    expected = _quantized(_plain(), training=True)
    network, _ = sn.convert(_plain(), statistics=statistics)
    close(_quantized(network, training=True), expected)


@case("PT2E quantization", "quantization-aware training under `Batch`", "torchao")
def _() -> None:
    _trained_quantized("batch")


def _exported_in_training(statistics: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        network, _ = sn.convert(_plain(), statistics=statistics)
        torch.export.export(network.train(), (X,))


@refusal(
    "PT2E quantization", "export for quantization-aware training under another policy",
    raises="in training for ever", result=WARNS, cure='`sn.convert(model, statistics="batch")`',
    cured=lambda: _exported_in_training("batch"),
)  # fmt: skip
def _() -> None:
    _exported_in_training("steady")

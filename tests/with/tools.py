"""Other people's tools on a converted model: what each does, and what must come of it."""

from __future__ import annotations

import copy
import io
import tempfile
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

import steadynorm as sn

from .case import (
    CASES,
    X,
    case,
    close,
    ours,
    refusal,
    same_answers,
    table,
    theirs,
    trains,
    verdict,
)  # fmt: skip

__all__ = ["CASES", "X", "close", "table", "verdict"]

# --- torch


@case("torch.compile", "training and inference, one graph")
def _() -> None:
    def compiled(network: nn.Module) -> Any:
        return torch.compile(network, fullgraph=True, backend="aot_eager")

    trains(compiled, ours())
    same_answers(compiled(ours()))


@case("torch.export", "inference; also in float16")
def _() -> None:
    same_answers(torch.export.export(ours(), (X,)).module())
    program = torch.export.export(ours().half(), (X.half(),)).module()
    close(program(X.half()), theirs()(X), 1e-2)


@case("torch.jit.trace", "inference")
def _() -> None:
    same_answers(torch.jit.trace(ours(), (X,)))


@refusal(
    "torch.jit.script", "compiles the layers", raises=r"sn\.convert\(",
    cure='`sn.fold`, then `sn.convert(model, to="torch")`',
    cured=lambda: same_answers(torch.jit.script(sn.convert(sn.fold(ours())[0], to="torch")[0])),
)  # fmt: skip
def _() -> None:
    torch.jit.script(ours())


@case("torch.fx", "symbolic_trace keeps each layer as one call")
def _() -> None:
    traced = torch.fx.symbolic_trace(ours())
    assert sum(isinstance(m, sn.BatchNorm2d) for m in traced.modules()) == 3
    same_answers(traced)


@case("SyncBatchNorm.convert_sync_batchnorm", "inference; training goes by torch's rule")
def _() -> None:
    same_answers(nn.SyncBatchNorm.convert_sync_batchnorm(ours()))


@case("torch.nn.utils.fusion", "fuse_conv_bn_eval")
def _() -> None:
    network = ours()
    network[0] = torch.nn.utils.fusion.fuse_conv_bn_eval(network[0], network[1])
    network[1] = nn.Identity()
    same_answers(network)


def _inside() -> Any:
    """A converted model whose first batch norm has its activation inside."""
    network = ours()
    network[1].activation, network[2] = "relu", nn.Identity()
    return network


@refusal(
    "SyncBatchNorm.convert_sync_batchnorm", "a layer with an activation inside",
    raises=r"lose the relu\. Use sn\.convert", cure="`sn.convert(model, synchronize=True)`",
    cured=lambda: same_answers(sn.convert(_inside(), synchronize=True)[0]),
)  # fmt: skip
def _() -> None:
    nn.SyncBatchNorm.convert_sync_batchnorm(_inside())


@refusal(
    "torch.nn.utils.fusion", "fuse_conv_bn_eval of a layer with an activation inside",
    raises=r"lose the relu\. Use .*sn\.fold", cure="`sn.fold` in its place",
    cured=lambda: same_answers(sn.fold(_inside())[0]),
)  # fmt: skip
def _() -> None:
    torch.nn.utils.fusion.fuse_conv_bn_eval(*_inside()[:2])


@case("torch.optim.swa_utils", "AveragedModel and update_bn")
def _() -> None:
    for statistics in ("batch", "steady"):
        averaged = torch.optim.swa_utils.AveragedModel(ours(statistics))
        torch.optim.swa_utils.update_bn([X], averaged)
        plain = theirs()
        torch.optim.swa_utils.update_bn([X], plain)
        close(averaged.eval()(X), plain.eval()(X), 2e-2)  # Steady keeps the biased variance


@refusal(
    "track_running_stats = False", "under a policy that needs the statistics",
    raises=r"needs running statistics.*sn\.freeze", cure="`sn.freeze(part)` in its place",
    cured=lambda: same_answers(sn.freeze(ours())[0].train()),
)  # fmt: skip
def _() -> None:
    network = ours().train()
    for module in network.modules():
        if isinstance(module, sn.BatchNorm2d):
            module.track_running_stats = False
    network(X)


# --- quantization


def _quantized(network: nn.Module) -> nn.Module:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    prepared = prepare_fx(network, get_default_qconfig_mapping("x86"), (X,))
    prepared(X)
    quantized: nn.Module = convert_fx(prepared)
    return quantized


@case("FX quantization", "after training, of a folded model")
def _() -> None:
    same_answers(_quantized(sn.fold(ours())[0]), 0.05)


@case("FX quantization", "after training, batch norms left in float32")
def _() -> None:
    same_answers(_quantized(ours()), 0.05)


def _fused(network: nn.Module, training: bool = False) -> nn.Module:
    from torch.ao.quantization import fuse_modules, fuse_modules_qat

    found: nn.Module = (fuse_modules_qat if training else fuse_modules)(network, [["0", "1", "2"]])
    return found


@case("eager quantization", "fuse_modules")
def _() -> None:
    fused = _fused(ours())
    assert not isinstance(fused[1], sn.BatchNorm2d)  # type: ignore[index]
    same_answers(fused)


def _fused_in_training() -> None:
    same_answers(_fused(sn.convert(ours(), to="torch")[0].train(), training=True).eval())


@refusal(
    "eager quantization", "fuse_modules_qat", raises=r"sn\.convert\(model, to=",
    cure='`sn.convert(model, to="torch")` before it', cured=_fused_in_training,
)  # fmt: skip
def _() -> None:
    _fused(ours().train(), training=True)


# --- runtimes


def _run_onnx(network: nn.Module, x: Tensor) -> Tensor:
    import onnxruntime

    file = io.BytesIO()
    torch.onnx.export(network, (x,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(found)


@case("ONNX and onnxruntime", "float32", "onnxruntime", "onnxscript")
def _() -> None:
    close(_run_onnx(ours(), X), theirs()(X))


@case("ONNX and onnxruntime", "float16, folded or not", "onnxruntime", "onnxscript")
def _() -> None:
    for network in (ours(), sn.fold(ours())[0]):
        close(_run_onnx(network.half(), X.half()), theirs()(X), 1e-2)


import_module("tests.with.runtimes")  # here, so that its rows follow

# --- trainers


def _lightning() -> Any:
    import pytorch_lightning as lightning

    class Module(lightning.LightningModule):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            loss: Tensor = self.network(batch).square().mean()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    def fit(network: nn.Module, *callbacks: Any, **settings: Any) -> Any:
        trainer = lightning.Trainer(
            max_epochs=1, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", **settings,
        )  # fmt: skip
        module = Module(network.train())  # the Trainer keeps modes as they are
        trainer.fit(module, torch.utils.data.DataLoader(X, 4))
        return module.network

    return lightning, fit


def _by_hand(network: Any) -> Any:
    network.train()
    with torch.no_grad():
        for batch in X.split(4):
            network(batch)
    return network.eval()


@case("Lightning", "Trainer.fit", "pytorch_lightning")
def _() -> None:
    found = _lightning()[1](ours()).eval()
    close(found(X), _by_hand(ours())(X))


@refusal(
    "Lightning", "BaseFinetuning.freeze(train_bn=False)", "pytorch_lightning",
    raises=r"needs running statistics.*sn\.freeze", cure="`sn.freeze(part)` in its place",
    cured=lambda: same_answers(_lightning()[1](sn.freeze(ours())[0]).eval()),
)  # fmt: skip
def _() -> None:
    lightning, fit = _lightning()
    network = ours()
    lightning.callbacks.BaseFinetuning.freeze(network, train_bn=False)
    network[-1].weight.requires_grad_()
    fit(network)


def _resnet() -> Any:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    network = ResNetForImageClassification(config)
    with torch.no_grad():
        for _ in range(10):
            network(X)
    return network.eval()


@case("Hugging Face", "save_pretrained and from_pretrained of a converted model", "transformers")
def _() -> None:
    network, _ = sn.convert(_resnet(), statistics="steady")
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        loaded, _ = sn.convert(type(_resnet()).from_pretrained(folder), statistics="steady")
    close(loaded.eval()(X).logits, _resnet()(X).logits)


def _saved_before_folding() -> None:
    with tempfile.TemporaryDirectory() as folder:
        _resnet().save_pretrained(folder)
        loaded = type(_resnet()).from_pretrained(folder).eval()
    close(sn.fold(loaded, X)[0](X).logits, _resnet()(X).logits)
    weights = sn.fold(_resnet(), X)[0].state_dict()
    fresh = sn.fold(_resnet(), X)[0]
    fresh.load_state_dict(weights)
    close(fresh(X).logits, _resnet()(X).logits)


@refusal(
    "Hugging Face", "save_pretrained of a folded model", "transformers",
    raises="Save the model before sn.fold", cure="save before `sn.fold`, fold after loading",
    cured=_saved_before_folding,
)  # fmt: skip
def _() -> None:
    folded, _ = sn.fold(_resnet(), X)
    with tempfile.TemporaryDirectory() as folder:
        folded.save_pretrained(folder)


@case("DDP and FSDP2", "training, with synchronized layers")
def _() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    network, _ = sn.convert(theirs(), statistics="steady", synchronize=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        trains(nn.parallel.DistributedDataParallel, copy.deepcopy(network))
        mesh = init_device_mesh("cpu", (1,))
        trains(lambda network: fully_shard(network, mesh=mesh), network)
    finally:
        dist.destroy_process_group()


@case("accelerate", "Accelerator.prepare", "accelerate")
def _() -> None:
    from accelerate import Accelerator

    trains(Accelerator(cpu=True).prepare_model, ours())


@case("MONAI", "UNet, converted and folded", "monai")
def _() -> None:
    from monai.networks.nets import UNet

    torch.manual_seed(0)
    network = UNet(2, 3, 4, (4, 8), (2,), norm="batch", act="relu")
    network(X)
    expected = network.eval()(X)
    converted, _ = sn.convert(network, statistics="steady")
    close(converted(X), expected)
    close(sn.fold(converted, X)[0](X), expected)


# --- Keras and flax


@case("Keras applications", "a whole model converted; its weights go both ways", "keras")
def _() -> None:
    import keras
    import numpy as np

    from steadynorm.keras import convert

    network = keras.applications.MobileNet(
        input_shape=(32, 32, 3), alpha=0.25, classes=4, weights=None
    )
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    converted = convert(network, statistics="steady")
    expected = torch.as_tensor(keras.ops.convert_to_numpy(network(x, training=False)))
    close(torch.as_tensor(keras.ops.convert_to_numpy(converted(x, training=False))), expected)
    network.set_weights(converted.get_weights())


@case("flax with optax and orbax", "a training step; a checkpoint", "flax", "optax", "orbax")
def _() -> None:
    import numpy as np
    import optax
    import orbax.checkpoint as orbax
    from flax import nnx

    from steadynorm.jax import BatchNorm

    def build() -> Any:
        rngs = nnx.Rngs(0)
        return nnx.Sequential(
            nnx.Linear(3, 4, rngs=rngs), BatchNorm(4, statistics="steady", rngs=rngs)
        )

    network, x = build(), np.asarray(X[:, :, 0, 0])
    optimizer = nnx.Optimizer(network, optax.adam(1e-3), wrt=nnx.Param)
    optimizer.update(network, nnx.grad(lambda network: (network(x) ** 2).sum())(network))
    network.eval()
    _, state = nnx.split(network)
    with tempfile.TemporaryDirectory() as folder, orbax.StandardCheckpointer() as files:
        files.save(f"{folder}/state", state)
        files.wait_until_finished()
        graph, empty = nnx.split(build())
        loaded = nnx.merge(graph, files.restore(f"{folder}/state", empty))
    loaded.eval()
    close(torch.tensor(np.array(loaded(x))), torch.tensor(np.array(network(x))))

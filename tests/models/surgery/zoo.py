"""Real networks with batch norm, small, built from their configurations; nothing is downloaded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import torch
from torch import Tensor, nn

from steadynorm.models.graph import call, tensors
from steadynorm.models.layers import is_host


class Entry(NamedTuple):
    """`build()` the model; `inputs()` a batch it can train on."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]


ZOO: dict[str, Entry] = {}


def entry(name: str, *shape: int) -> Callable[[Callable[[], nn.Module]], None]:
    def add(build: Callable[[], nn.Module]) -> None:
        ZOO[name] = Entry(build, lambda: torch.randn(*shape))

    return add


def disturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights that let signals through, and batch norms as training would leave them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if is_host(module):
                nn.init.kaiming_normal_(module.weight, generator=generator)
            mean = getattr(module, "running_mean", None)
            if not isinstance(mean, Tensor):
                continue
            mean.copy_(0.3 * torch.randn(mean.shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(mean.shape, generator=generator))
            if module.weight is not None:
                module.weight.copy_(0.7 + 0.6 * torch.rand(mean.shape, generator=generator))
                module.bias.copy_(0.3 * torch.randn(mean.shape, generator=generator))
    return model


def train_briefly(model: nn.Module, inputs: Any, steps: int = 3) -> nn.Module:
    """A few real steps of gradient descent on noise, so that weights and statistics have moved."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = [t for t in tensors(call(model, inputs)) if t.requires_grad]
        sum((t.float() ** 2).mean() for t in outputs).backward()
        optimizer.step()
    return model


# --- Hugging Face transformers


def huggingface(name: str, **settings: Any) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    config = getattr(transformers, name + "Config")(**settings.pop("config", {}))
    return getattr(transformers, name + settings.pop("head", "ForImageClassification"))(config)


@entry("transformers ResNet (basic)", 4, 3, 32, 32)
def _() -> nn.Module:
    return huggingface(
        "ResNet",
        config=dict(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic"),
    )


@entry("transformers ResNet (bottleneck)", 4, 3, 32, 32)
def _() -> nn.Module:
    return huggingface(
        "ResNet", config=dict(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2])
    )


@entry("transformers RegNet (y)", 4, 3, 32, 32)
def _() -> nn.Module:
    return huggingface(
        "RegNet",
        config=dict(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], groups_width=4),
    )


@entry("transformers MobileNetV1", 4, 3, 64, 64)
def _() -> nn.Module:
    return huggingface("MobileNetV1", config=dict(depth_multiplier=0.25, min_depth=4))


@entry("transformers MobileNetV2", 4, 3, 64, 64)
def _() -> nn.Module:
    return huggingface("MobileNetV2", config=dict(depth_multiplier=0.25, image_size=64))


@entry("transformers EfficientNet", 4, 3, 64, 64)
def _() -> nn.Module:
    return huggingface(
        "EfficientNet",
        config=dict(
            width_coefficient=0.25, depth_coefficient=0.3, image_size=64, hidden_dim=320,
            drop_connect_rate=0.0, dropout_rate=0.0,
        ),
    )  # fmt: skip


@entry("transformers LeViT", 4, 3, 64, 64)
def _() -> nn.Module:
    return huggingface(
        "Levit",
        config=dict(
            image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 2, 2],
            depths=[1, 1, 1], key_dim=[4, 4, 4], drop_path_rate=0,
        ),
    )  # fmt: skip


@entry("transformers MobileViT", 4, 3, 32, 32)
def _() -> nn.Module:
    return huggingface(
        "MobileViT",
        config=dict(
            image_size=32, hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
            num_attention_heads=2, hidden_dropout_prob=0.0, classifier_dropout_prob=0.0,
        ),
    )  # fmt: skip


@entry("transformers CvT", 4, 3, 32, 32)
def _() -> nn.Module:
    return huggingface(
        "Cvt",
        config=dict(
            embed_dim=[8, 16, 24], num_heads=[1, 2, 2], depth=[1, 2, 3],
            drop_rate=[0.0, 0.0, 0.0], drop_path_rate=[0.0, 0.0, 0.0],
        ),
    )  # fmt: skip


@entry("transformers Segformer", 4, 3, 64, 64)
def _() -> nn.Module:
    return huggingface(
        "Segformer",
        head="ForSemanticSegmentation",
        config=dict(
            hidden_sizes=[8, 16, 16, 32], num_attention_heads=[1, 2, 2, 2], depths=[1, 1, 1, 1],
            decoder_hidden_size=16, classifier_dropout_prob=0.0, drop_path_rate=0.0,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
    )  # fmt: skip


@entry("transformers RT-DETR ResNet (frozen)", 4, 3, 32, 32)
def _() -> nn.Module:
    import transformers
    from transformers.models.rt_detr.modeling_rt_detr import replace_batch_norm

    config = transformers.RTDetrResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1])
    model = transformers.RTDetrResNetBackbone(config)
    with torch.no_grad():
        replace_batch_norm(model)
    return model


# --- MONAI


def monai(name: str, *args: Any, **settings: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai.networks import nets

        return getattr(nets, name)(*args, **settings)


@entry("MONAI UNet 2d", 4, 1, 32, 32)
def _() -> nn.Module:
    return monai(
        "UNet", 2, 1, 2, channels=(4, 8, 16), strides=(2, 2), num_res_units=2,
        norm="batch", act="relu",
    )  # fmt: skip


@entry("MONAI UNet 3d (PReLU)", 2, 1, 16, 16, 16)
def _() -> nn.Module:
    return monai("UNet", 3, 1, 2, channels=(4, 8), strides=(2,), num_res_units=1, norm="batch")


@entry("MONAI BasicUNet", 4, 1, 32, 32)
def _() -> nn.Module:
    return monai("BasicUNet", 2, 1, 2, features=(4, 4, 8, 8, 16, 4), norm="batch")


@entry("MONAI DynUNet", 4, 1, 32, 32)
def _() -> nn.Module:
    return monai(
        "DynUNet", 2, 1, 2, kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2],
        filters=[4, 8, 16], norm_name="batch", res_block=True, deep_supervision=True,
        deep_supr_num=1,
    )  # fmt: skip


@entry("MONAI DenseNet", 4, 1, 32, 32)
def _() -> nn.Module:
    return monai("DenseNet", 2, 1, 3, init_features=8, growth_rate=4, block_config=(2, 2))


@entry("MONAI SegResNet", 4, 1, 32, 32)
def _() -> nn.Module:
    return monai(
        "SegResNet", 2, 4, 1, 2, norm="batch", blocks_down=(1, 2), blocks_up=(1,)
    )  # fmt: skip


@entry("MONAI ResNet 3d", 2, 1, 16, 16, 16)
def _() -> nn.Module:
    return monai(
        "ResNet", "basic", [1, 1, 1, 1], [4, 8, 8, 16], n_input_channels=1, num_classes=2
    )  # fmt: skip


@entry("MONAI SE-ResNet50", 2, 1, 64, 64)
def _() -> nn.Module:
    return monai("SEResNet50", layers=[1, 1, 1, 1], spatial_dims=2, in_channels=1, num_classes=2)


@entry("MONAI EfficientNet", 2, 1, 64, 64)
def _() -> nn.Module:
    from monai.networks.nets import EfficientNet

    blocks = ["r1_k3_s11_e1_i32_o16_se0.25", "r2_k3_s22_e2_i16_o24_se0.25"]
    return EfficientNet(
        blocks, spatial_dims=2, in_channels=1, num_classes=2, image_size=64, drop_connect_rate=0.0,
        dropout_rate=0.0,
    )  # fmt: skip


@entry("MONAI VNet", 4, 1, 16, 16)
def _() -> nn.Module:
    return monai("VNet", 2, 1, 2, dropout_prob_down=0.0, dropout_prob_up=(0.0, 0.0))


@entry("MONAI HighResNet", 4, 1, 16, 16)
def _() -> nn.Module:
    layers = (
        {"name": "conv_0", "n_features": 4, "kernel_size": 3},
        {"name": "res_1", "n_features": 4, "kernels": (3, 3), "repeat": 2},
        {"name": "res_2", "n_features": 8, "kernels": (3, 3), "repeat": 1},
        {"name": "conv_1", "n_features": 8, "kernel_size": 1},
        {"name": "conv_2", "kernel_size": 1},
    )
    return monai("HighResNet", 2, 1, 2, norm_type="batch", layer_params=layers)

"""Variants of many architectures with batch norm, small; nothing is downloaded.

Each architecture's own settings that change what stands beside a batch norm: activations, blocks,
shortcuts, heads, axes. `VARIANTS` holds those of `zoo.ZOO` too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from tests.models.surgery.zoo import ZOO, Entry, huggingface, monai
from torch import nn

VARIANTS: dict[str, Entry] = dict(ZOO)


def grid(**choices: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every combination, with a name that says what was chosen."""
    for values in product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        yield ", ".join(f"{key}={_short(value)}" for key, value in chosen.items()), chosen


def _short(value: Any) -> str:
    named = isinstance(value, tuple) and isinstance(value[-1], dict)
    return " ".join([value[0], *value[1]]) if named else str(value)


def add(name: str, build: Callable[..., nn.Module], inputs: Any, **choices: Any) -> None:
    """`inputs`: a shape, or a function that makes them."""
    make = inputs if callable(inputs) else lambda: torch.randn(*inputs)
    for said, chosen in grid(**choices):
        title = f"{name} ({said})" if said else name
        assert title not in VARIANTS, title
        VARIANTS[title] = Entry(lambda chosen=chosen: build(**chosen), make)


def hf(
    name: str, inputs: Any, config: dict[str, Any], head: str = "ForImageClassification",
    **choices: Any,
) -> None:  # fmt: skip
    def build(**chosen: Any) -> nn.Module:
        return huggingface(name, head=head, config={**config, **chosen})

    title = name + (f" {head}" if head != "ForImageClassification" else "")
    add(f"transformers {title}", build, inputs, **choices)


IMAGES = (4, 3, 32, 32)
LARGE = (2, 3, 64, 64)
ACTS = ["relu", "gelu", "silu"]
SMALL = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1])

# --- Hugging Face transformers

hf(
    "ResNet", IMAGES, SMALL, layer_type=["basic", "bottleneck"], hidden_act=ACTS,
    downsample_in_first_stage=[False, True],
)  # fmt: skip
hf("ResNet", IMAGES, {**SMALL, "layer_type": "bottleneck"}, downsample_in_bottleneck=[True])
hf("ResNet", IMAGES, SMALL, "Backbone", layer_type=["basic", "bottleneck"])
hf(
    "RegNet", IMAGES, {**SMALL, "groups_width": 4}, layer_type=["x", "y"], hidden_act=ACTS
)  # fmt: skip
hf(
    "MobileNetV1", LARGE, dict(depth_multiplier=0.25, min_depth=4), tf_padding=[True, False],
    hidden_act=["relu", "relu6", "silu"],
)  # fmt: skip
hf(
    "MobileNetV2", LARGE, dict(depth_multiplier=0.25, image_size=64), tf_padding=[True, False],
    hidden_act=["relu6", "silu"], first_layer_is_expansion=[True, False],
)  # fmt: skip
hf(
    "MobileNetV2", LARGE, dict(depth_multiplier=0.25, image_size=64), "ForSemanticSegmentation",
    output_stride=[8],
)  # fmt: skip
hf(
    "EfficientNet", LARGE, dict(width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320),
    hidden_act=["swish", "relu"], squeeze_expansion_ratio=[0.25],
)  # fmt: skip
hf(
    "MobileViTV2", LARGE, dict(image_size=64, width_multiplier=0.25, n_attn_blocks=[1, 1, 1]),
    hidden_act=["swish", "relu"],
)  # fmt: skip
hf(
    "SwiftFormer", LARGE, dict(image_size=64, depths=[1, 1, 1, 1], embed_dims=[8, 8, 16, 16]),
    hidden_act=["gelu", "relu"], use_layer_scale=[True, False],
)  # fmt: skip
hf(
    "HGNetV2", LARGE,
    dict(
        stem_channels=[3, 8, 8], stage_in_channels=[8, 16, 16, 16],
        stage_mid_channels=[8, 8, 8, 8], stage_out_channels=[16, 16, 16, 16],
        stage_num_blocks=[1, 1, 1, 1], stage_numb_of_layers=[2, 2, 2, 2],
        hidden_sizes=[16, 16, 16, 16], depths=[1, 1, 1, 1],
    ),
    hidden_act=["relu", "silu"], use_learnable_affine_block=[False, True],
)  # fmt: skip
hf("PPLCNet", LARGE, dict(scale=0.25), hidden_act=["hardswish", "relu"])
hf("PPLCNetV3", LARGE, dict(scale=0.25), "Backbone", hidden_act=["hardswish"])
hf(
    "TextNet", LARGE,
    dict(
        hidden_sizes=[8, 8, 16, 16, 16], stem_out_channels=8, image_size=[64, 64],
        conv_layer_kernel_sizes=[[[3, 3]], [[3, 1]], [[1, 3], [3, 3]], [[3, 3]]],
        conv_layer_strides=[[2], [2], [2, 1], [2]],
    ),
    stem_act_func=["relu"],
)  # fmt: skip
hf("RTDetrResNet", IMAGES, SMALL, "Backbone", layer_type=["basic", "bottleneck"], hidden_act=ACTS)
hf(
    "Levit", LARGE,
    dict(
        image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 2, 2], depths=[1, 1, 1],
        key_dim=[4, 4, 4], drop_path_rate=0,
    ),
    "ForImageClassificationWithTeacher", stride=[2],
)  # fmt: skip
hf(
    "PatchTST", lambda: {"past_values": torch.randn(4, 32, 3)},
    dict(
        num_input_channels=3, patch_length=4, patch_stride=4, d_model=16, ffn_dim=16,
        num_hidden_layers=2, norm_type="batchnorm", num_targets=2,
    ),
    "ForClassification", pre_norm=[True, False], activation_function=["gelu", "relu"],
)  # fmt: skip
hf(
    "PatchTSMixer", lambda: {"past_values": torch.randn(4, 32, 3)},
    dict(num_input_channels=3, norm_mlp="BatchNorm", dropout=0.0, head_dropout=0.0),
    "ForPrediction", mode=["common_channel", "mix_channel"], gated_attn=[True, False],
)  # fmt: skip

# --- MONAI

TORCH_ACTS = ["relu", "prelu", "leakyrelu", "elu", "swish", ("relu", {"inplace": True})]


def _monai(name: str, inputs: Any, *args: Any, settings: Any = None, **choices: Any) -> None:
    def build(**chosen: Any) -> nn.Module:
        return monai(name, *args, **(settings or {}), **chosen)

    add(f"MONAI {name}", build, inputs, **choices)


SLICE = (4, 1, 32, 32)
VOLUME = (2, 1, 16, 16, 16)
UNET = dict(channels=(4, 8), strides=(2,), norm="batch")
_monai("UNet", SLICE, 2, 1, 2, settings=UNET, act=TORCH_ACTS[:5], num_res_units=[0, 2])
_monai("UNet", SLICE, 2, 1, 2, settings={**UNET, "act": "relu"}, adn_ordering=["AN", "NAD"])
_monai("UNet", VOLUME, 3, 1, 2, settings=UNET, act=["relu", "elu"], bias=[True, False])
FEATURES = dict(features=(4, 4, 8, 8, 16, 4), norm="batch")
_monai("BasicUNet", SLICE, 2, 1, 2, settings=FEATURES, act=TORCH_ACTS)
_monai("BasicUNet", SLICE, 2, 1, 2, settings=FEATURES, upsample=["pixelshuffle", "nontrainable"])
_monai("BasicUNetPlusPlus", SLICE, 2, 1, 2, settings=FEATURES, deep_supervision=[False, True])
_monai("AttentionUnet", SLICE, 2, 1, 2, channels=[(4, 8, 16)], strides=[(2, 2)])
DYN = dict(
    kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2], filters=[4, 8, 16],
    norm_name="batch",
)  # fmt: skip
_monai("DynUNet", SLICE, 2, 1, 2, settings=DYN, res_block=[True, False], act_name=TORCH_ACTS[:3])
DENSE = dict(init_features=8, growth_rate=4, block_config=(2, 2))
_monai("DenseNet", SLICE, 2, 1, 3, settings=DENSE, act=["relu", "elu", "swish"])
_monai("DenseNet", VOLUME, 3, 1, 3, settings=DENSE, dropout_prob=[0.0])
SEG = dict(norm="batch", blocks_down=(1, 2), blocks_up=(1,))
_monai("SegResNet", SLICE, 2, 4, 1, 2, settings=SEG, act=["relu", "elu", "leakyrelu"])
_monai("SegResNet", SLICE, 2, 4, 1, 2, settings=SEG, upsample_mode=["deconv", "pixelshuffle"])
_monai("SegResNetDS", SLICE, 2, 4, 1, 2, settings=dict(blocks_down=(1, 2)), act=["relu", "elu"])
for _block in ("basic", "bottleneck"):
    _monai(
        "ResNet", SLICE, _block, [1, 1, 1, 1], [4, 8, 8, 16], 2, 1,
        settings=dict(num_classes=2, no_max_pool=True), shortcut_type=["A", "B"],
        act=["relu", "elu"],
        bias_downsample=[_block == "basic"],
    )  # fmt: skip
for _senet in ("SEResNet50", "SEResNext50"):
    _monai(
        _senet, (2, 1, 64, 64), settings=dict(layers=[1, 1, 1, 1], spatial_dims=2, in_channels=1),
        input_3x3=[False, True],
    )  # fmt: skip
_monai("VNet", (4, 1, 16, 16), 2, 1, 2, settings=dict(
    dropout_prob_down=0.0, dropout_prob_up=(0.0, 0.0)), act=["relu", "elu"], bias=[True, False],
)  # fmt: skip
_monai("AutoEncoder", SLICE, 2, 1, 1, settings={**UNET, "strides": (2, 2)}, act=["relu", "prelu"],
       num_res_units=[0, 1])  # fmt: skip
_monai("VarAutoEncoder", SLICE, 2, (1, 32, 32), 1, 4, settings={**UNET, "strides": (2, 2)},
       use_mean_at_inference=[True])  # fmt: skip
_monai(
    "Discriminator", SLICE, (1, 32, 32), (4, 8), (2, 2), settings=dict(norm="batch", dropout=None),
    act=["relu", "leakyrelu"], num_res_units=[0, 2],
)  # fmt: skip
_monai(
    "Classifier", SLICE, (1, 32, 32), 3, (4, 8), (2, 2), settings=dict(norm="batch"), act=["elu"]
)
_monai("PatchDiscriminator", SLICE, 2, 4, 1, num_layers_d=[2])
_monai("RegUNet", SLICE, 2, 1, 4, 2, concat_skip=[False, True])
_monai("LocalNet", SLICE, 2, 1, 4, (0, 1), use_additive_sampling=[True, False])
_monai("FlexibleUNet", (2, 1, 64, 64), 1, 2, "resnet10",
       settings=dict(decoder_channels=(16, 8, 8, 8, 4)), act=["relu", "elu"])  # fmt: skip

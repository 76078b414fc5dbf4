"""Faults that the doctor once missed, in networks that others wrote: named first, or said why not.

What cannot be known from what is given stands in docs/doctor.md, under "What it cannot know".
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.doctor.gallery.networks import Before, digits, fit
from tests.doctor.outside import (
    Logits,
    accuracy,
    batches,
    build,
    by_class,
    data,
    large,
    norms,
    trained,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, update_bn

import steadynorm as sn
from steadynorm.doctor import Finding, Report, Severity


def first(report: Report) -> Finding:
    assert report.findings, report
    return report.findings[0]


def of(report: Report, code: str) -> list[Finding]:
    return [finding for finding in report.findings if finding.code == code]


def read_digits(model: nn.Module, **settings: Any) -> nn.Module:
    settings = {"steps": 60, "rate": 5e-3, **settings}
    return fit(model, source=large(batches(32)) * 3, **settings)


def with_function(number: int, function: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    """transformers' ResNet with a function before one of its batch norms."""
    model = build("ResNet")
    layer = norms(model)[number]
    owner = next(m for m in model.modules() if layer in m.children())
    owner.normalization = Before(function, layer)
    return model


# --- the wrong axis


def bert(**norm: nn.Module) -> Any:
    """transformers' BERT, small; `norm`: what stands in for layer norms, by where."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        vocab_size=50, num_labels=10,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    if "output" in norm:
        model.bert.encoder.layer[0].output.LayerNorm = norm["output"]
    if "embeddings" in norm:
        model.bert.embeddings.LayerNorm = norm["embeddings"]
    return model


def tokens(lengths: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Token numbers (N, L), 0 where padded, and the mask of valid positions."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(8):
        ids = torch.randint(1, 50, (16, 24), generator=generator)
        length = torch.randint(6, 25, (16,), generator=generator)
        valid = torch.arange(24)[None] < (length[:, None] if lengths else 24)
        made.append((ids * valid, valid.long()))
    return made


class MovedAround(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x.movedim(-1, 1)).movedim(1, -1)
        return out


def test_a_norm_along_the_positions_of_a_transformer() -> None:
    given = [ids for ids, _ in tokens()]
    report = sn.diagnose(bert(output=nn.BatchNorm1d(24)), given)
    assert (first(report).code, first(report).layer) == (
        "SN311", "bert.encoder.layer.0.output.LayerNorm"
    )  # fmt: skip
    assert first(report).evidence["axis"] == 2
    report = sn.diagnose(bert(output=MovedAround(nn.BatchNorm1d(16))), given)
    assert of(report, "SN311") == []


def test_a_norm_along_the_positions_behind_the_token_of_a_class() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=16, patch_size=4, num_channels=1, hidden_size=8, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16, num_labels=10,
    )  # fmt: skip
    model = Logits(transformers.ViTForImageClassification(config))
    block: Any = model.inner.vit.layers[0]
    block.layernorm_before = nn.BatchNorm1d(17)
    report = sn.diagnose(model, data(), loss=F.cross_entropy)
    assert first(report).layer.endswith("layernorm_before")
    assert (first(report).code, first(report).evidence["axis"]) == ("SN311", 2)
    block.layernorm_before = MovedAround(nn.BatchNorm1d(8))
    assert of(sn.diagnose(model, data(), loss=F.cross_entropy), "SN311") == []


@pytest.mark.parametrize("mode", ["common_channel", "mix_channel"])
def test_a_network_that_mixes_one_axis_after_the_other_is_left_alone(mode: str) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.PatchTSMixerConfig(
        context_length=32, prediction_length=8, num_input_channels=3, patch_length=4,
        patch_stride=4, d_model=8, num_layers=2, norm_mlp="BatchNorm", mode=mode,
    )  # fmt: skip
    model = transformers.PatchTSMixerForPrediction(config)
    given = [
        {"past_values": torch.randn(16, 32, 3), "future_values": torch.randn(16, 8, 3)}
        for _ in range(8)
    ]
    assert of(sn.diagnose(model, given), "SN311") == []


def test_a_norm_along_the_rows_of_pictures_with_channels_last() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_channels=1, image_size=32, num_labels=10,
        num_stages=2,
    )  # fmt: skip
    model = Logits(transformers.ConvNextForImageClassification(config))
    block: Any = model.inner.convnext.encoder.stages[0].layers[0]  # 8 channels, 8×8 pixels
    given = [(F.interpolate(x, scale_factor=2), y) for x, y in data()]
    block.layernorm = nn.BatchNorm2d(8)
    report = sn.diagnose(model, given, loss=F.cross_entropy)
    assert (first(report).code, first(report).evidence["axis"]) == ("SN311", 3)
    block.layernorm = MovedAround(nn.BatchNorm2d(8))
    assert of(sn.diagnose(model, given, loss=F.cross_entropy), "SN311") == []


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("both_ways", [False, True])
def test_a_norm_along_the_steps_of_a_recurrent_layer(kind: Any, both_ways: bool) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = kind(8, 16, batch_first=True, bidirectional=both_ways)
            self.norm = nn.BatchNorm1d(8)
            self.out = nn.Linear(32 if both_ways else 16, 10)

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.out(self.norm(self.steps(x[:, 0])[0])[:, -1])
            return answer

    torch.manual_seed(0)
    report = sn.diagnose(Tagger(), batches(count=8), loss=F.cross_entropy)
    assert (first(report).code, first(report).evidence["axis"]) == ("SN311", 2)


# --- padding


class Flattened(nn.Module):
    """Rows (N·L, C), as many write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x.flatten(0, 1)).view_as(x)
        return out


def test_padding_in_flattened_rows_by_a_mask_that_reaches_the_model_alone() -> None:
    model = bert(embeddings=Flattened(16))
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.normal_()
        model.bert.embeddings.word_embeddings.weight[0] = 3

    def forward(model: nn.Module, batch: Any) -> Any:
        return model(input_ids=batch[0], attention_mask=batch[1]).logits

    report = sn.diagnose(model, tokens(lengths=True), forward=forward)
    assert (first(report).code, first(report).layer) == ("SN305", "bert.embeddings.LayerNorm.norm")
    assert "says the batch's mask" in first(report).message
    assert of(sn.diagnose(model, tokens(), forward=forward), "SN305") == []


def points(repeated: bool) -> list[Tensor]:
    """Clouds of 8 to 64 points whose last point lies outside, filled up by repeating it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 16, 3, 64, generator=generator)
    for cloud in x.flatten(0, 1):
        length = int(torch.randint(8, 65, (1,), generator=generator)) if repeated else 64
        cloud[:, length - 1 :] = cloud[:, length - 1 : length] + 3
    return list(x)


def test_padding_by_repeating_a_point() -> None:
    from monai.networks.nets import DenseNet

    torch.manual_seed(0)
    model = DenseNet(
        spatial_dims=1, in_channels=3, out_channels=10, init_features=8, growth_rate=4,
        block_config=(2, 2),
    )  # fmt: skip
    assert [f.layer for f in of(sn.diagnose(model, points(True)), "SN305")] == ["features.norm0"]
    assert of(sn.diagnose(model, points(False)), "SN305") == []


# --- what is drawn at random


def test_dropout_as_a_function_before_a_norm() -> None:
    model = read_digits(with_function(2, lambda m, x: F.dropout(x, 0.4, m.training)))
    report = sn.diagnose(model, data(), loss=F.cross_entropy)
    assert first(report).code == "SN312"
    assert first(report).layer.endswith("layers.0.layer.0.normalization.norm")


def test_stochastic_depth_before_a_norm() -> None:
    def half_the_time(module: nn.Module, x: Tensor) -> Tensor:
        return x * (torch.rand(len(x), 1, 1, 1) < 0.5) * 2 if module.training else x

    report = sn.diagnose(read_digits(with_function(4, half_the_time)), data(), loss=F.cross_entropy)
    assert first(report).code == "SN312"


def test_dropout_as_a_function_that_drops_in_inference_too() -> None:
    model = read_digits(with_function(2, lambda _, x: F.dropout(x, 0.4)))
    report = sn.diagnose(model, data(), loss=F.cross_entropy)
    assert (first(report).code, of(report, "SN312")) == ("SN313", [])


def test_dropout_behind_the_norms_is_left_alone() -> None:
    model = build("ResNet")
    model.inner.classifier = nn.Sequential(  # type: ignore[union-attr]
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(32, 10)
    )
    report = sn.diagnose(read_digits(model), data(), loss=F.cross_entropy)
    assert of(report, "SN312") == of(report, "SN313") == []


# --- a norm as the last layer


def test_a_classifier_that_ends_in_a_norm() -> None:
    model = build("ResNet")
    model.inner.classifier = nn.Sequential(  # type: ignore[union-attr]
        nn.Flatten(), nn.Linear(32, 10, bias=False), nn.BatchNorm1d(10)
    )
    read_digits(model)
    finding = first(sn.diagnose(model, data(), loss=F.cross_entropy))
    assert (finding.code, finding.severity) == ("SN212", Severity.WARNING)
    assert of(sn.diagnose(model, [x for x, _ in data()]), "SN212") == []  # perhaps a projection


# --- frozen by omission


class HeadAlone(nn.Module):
    """Trains the classifier of a network whose rest runs under no_grad."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.inner.inner.resnet(x).pooler_output
        out: Tensor = self.inner.inner.classifier(x)
        return out


def test_a_backbone_under_no_grad_in_training_mode() -> None:
    model = HeadAlone(trained())
    finding = first(sn.diagnose(model.train(), data(), loss=F.cross_entropy))
    assert finding.code == "SN203"
    assert finding.message.startswith("weight and bias are run without gradient")
    assert of(sn.diagnose(model.eval(), data(), loss=F.cross_entropy), "SN203") == []


def test_a_backbone_left_out_of_the_optimizer() -> None:
    model: Any = trained().train()
    head = torch.optim.SGD(model.inner.classifier.parameters(), lr=0.1)
    finding = first(sn.diagnose(model, optimizer=head))
    assert finding.code == "SN203"
    assert finding.message.startswith("weight and bias are in no optimizer")
    for optimizer in (torch.optim.SGD(model.parameters(), lr=0.1), another()):
        assert of(sn.diagnose(model, optimizer=optimizer), "SN203") == []


def another() -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)


def test_an_average_over_so_many_batches_that_nothing_moves_it() -> None:
    model = trained().train()
    for norm in norms(model):
        norm.momentum = None
        norm.num_batches_tracked.fill_(50_000)
    assert first(sn.diagnose(model)).code == "SN213"


# --- averaged weights


def averaged() -> tuple[AveragedModel, Report]:
    model = build("ResNet")
    average = AveragedModel(model)

    def take(step: int) -> None:
        if step > 20 and step % 5 == 0:
            average.update_parameters(model)

    read_digits(model, rate=1e-1, cycle=False, before=take)  # weights that move fast
    return average.eval(), sn.diagnose(average, data(), loss=F.cross_entropy)


def test_averaged_weights_with_the_statistics_of_others() -> None:
    average, report = averaged()
    before = accuracy(average)
    assert first(report).code == "SN214"
    assert of(sn.diagnose(average), "SN214")[0].severity is Severity.INFO
    sn.calibrate(average, large(batches(32)), progress=False)
    assert accuracy(average) > before + 0.03
    update_bn(large(batches(32)), average)
    assert of(sn.diagnose(average.eval(), data(), loss=F.cross_entropy), "SN214") == []


# --- scales


def test_a_scale_factor_that_was_not_applied_in_a_checkpoint_alone() -> None:
    state = trained("RegNet").state_dict()
    assert of(sn.diagnose(state), "SN111") == []
    for name, value in state.items():
        if name.endswith(("running_mean", "running_var")):
            value.mul_(999.982)
    (finding,) = of(sn.diagnose(state), "SN111")
    assert 200 < float(finding.evidence["variance_over_weights"]) < 5000


def test_weights_of_another_eps() -> None:
    """Trained with 1e-3 behind small weights, run with 1e-5: no trace in the checkpoint."""
    model, small = build("ResNet"), 0.02
    convolutions = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        for weight, norm in zip(convolutions, norms(model), strict=True):
            weight.mul_(small)
            norm.eps = 1e-3
    held = {id(weight) for weight in convolutions}
    others = [p for p in model.parameters() if id(p) not in held]
    read_digits(
        model,
        steps=90,
        optimizer=torch.optim.Adam(
            [{"params": convolutions, "lr": 5e-3 * small}, {"params": others, "lr": 5e-3}]
        ),
    )
    right = accuracy(model)
    assert of(sn.diagnose(model, data(), loss=F.cross_entropy), "SN108")[0].severity < 3
    for norm in norms(model):
        norm.eps = 1e-5
    assert accuracy(model) < right - 0.05
    assert first(sn.diagnose(model, data(), loss=F.cross_entropy)).code == "SN108"


@pytest.mark.parametrize("shrunk", [1e-3, 1e-5])
def test_weights_so_small_that_eps_decides(shrunk: float) -> None:
    model = trained()
    convolution = [m for m in model.modules() if isinstance(m, nn.Conv2d)][3]
    norm, right = norms(model)[3], accuracy(model)
    with torch.no_grad():
        convolution.weight.mul_(shrunk)
    norm.running_mean.mul_(shrunk)
    norm.running_var.mul_(shrunk**2)
    assert accuracy(model) < right - 0.1
    finding = first(sn.diagnose(model, data(), loss=F.cross_entropy))
    assert finding.code == "SN104"
    assert "before it has no weight above" in finding.message


# --- samples that are not independent


@pytest.mark.parametrize("kind", ["ResNet", "RegNet"])
def test_classes_in_order(kind: str) -> None:
    for mixed, named in ((0.0, True), (0.3, True), (1.0, False)):
        report = sn.diagnose(copy.deepcopy(trained(kind)), by_class(mixed), loss=F.cross_entropy)
        assert bool(of(report, "SN309")) is named, (mixed, str(report))


def test_frames_of_one_recording_in_a_batch() -> None:
    """Each batch is one digit that moves a little and gets noise."""
    generator = torch.Generator().manual_seed(0)
    images = large([(digits()[0][:32], digits()[1][:32])])[0][0]
    frames = [
        image.repeat(16, 1, 1, 1).roll(number % 2, 3)
        + 0.1 * torch.randn(16, 1, 16, 16, generator=generator)
        for number, image in enumerate(images)
    ]
    assert first(sn.diagnose(trained(), frames)).code == "SN309"

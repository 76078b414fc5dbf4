"""The digits as tensors, and the order in which training sees them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from steadynorm.evidence.lab.data import Digits


def tensors(digits: Digits) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then test ones: images (N, 1, H, W), scaled to mean 0 and
    standard deviation 1 over the training set.
    """
    mean, std = digits.train_images.mean(), digits.train_images.std()
    train, test = (
        torch.from_numpy((images - mean) / std).unsqueeze(1)
        for images in (digits.train_images, digits.test_images)
    )
    return (
        train,
        torch.from_numpy(digits.train_labels),
        test,
        torch.from_numpy(digits.test_labels),
    )


def batches(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Index tensors of exactly `batch_size`, epoch after epoch without end; what is left over at
    the end of an epoch joins the next one's beginning.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    while True:
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        batch, order = order[:batch_size], order[batch_size:]
        yield batch

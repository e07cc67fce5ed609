"""Which RoIs are mimicked, how they are cropped, and the loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from d2det.core import crop_patches, mimic_loss, select_rois

#                         image 0            image 1   image 2
CLASSES = torch.tensor([0, 3, 1, -1, 2, 0, 3, 3, -1, 1, 3])
IMAGES = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2])


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("foreground", [0, 2, 4, 5, 9]),
        ("background", [1, 6, 7, 10]),
        ("foreground+background", [0, 1, 2, 4, 5, 6, 7, 9, 10]),
    ],
)
def test_the_chosen_kind_without_ignored_rois(choice, expected):
    assert select_rois(CLASSES, IMAGES, 3, choice=choice, limit=9).tolist() == expected


def test_the_limit_is_each_images_own_and_the_draw_random():
    draws = [
        select_rois(CLASSES, IMAGES, 3, choice="foreground", limit=2).tolist() for _ in range(60)
    ]
    assert all(len(d) == 3 and d == sorted(d) and 9 in d for d in draws)
    pairs = [tuple(d[:2]) for d in draws]
    assert set(pairs) == {(0, 2), (0, 4), (0, 5), (2, 4), (2, 5), (4, 5)}


def test_nothing_to_choose_from():
    none = torch.zeros(0, dtype=torch.int64)
    assert select_rois(none, none, 3, choice="foreground", limit=2).tolist() == []
    assert select_rois(CLASSES[6:9], IMAGES[6:9], 3, choice="foreground", limit=2).tolist() == []
    with pytest.raises(ValueError, match="'all'"):
        select_rois(CLASSES, IMAGES, 3, choice="all", limit=2)


def test_a_whole_image_is_resized_as_interpolate_does():
    image = torch.rand(1, 3, 12, 20)
    rois = torch.tensor([[0.0, 0.0, 0.0, 20.0, 12.0]])
    larger = crop_patches(image, [(12, 20)], rois, 32)
    expected = F.interpolate(image, (32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(larger, expected)


def test_a_large_roi_is_averaged_not_sampled():
    # Each new pixel covers four old columns, the first of them bright: one sample would miss it.
    image = (torch.arange(32) % 4 == 0).float().expand(1, 3, 32, 32)
    rois = torch.tensor([[0.0, 0.0, 0.0, 32.0, 32.0]])
    patch = crop_patches(image, [(32, 32)], rois, 8)
    torch.testing.assert_close(patch, torch.full((1, 3, 8, 8), 0.25))


def test_crops_of_each_image_and_no_padding_in_them():
    images = torch.full((2, 3, 16, 24), 1e6)  # padding that would show
    sizes = [(10, 16), (16, 24)]
    own = [torch.rand(3, *size) for size in sizes]
    for image, pixels in zip(images, own, strict=True):
        image[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    before = images.clone()
    rois = torch.tensor(
        [[1.0, 4.0, 2.0, 24.0, 16.0], [0.0, 0.0, 0.0, 16.0, 10.0], [0.0, 9.0, 3.0, 16.0, 10.0]]
    )
    together = crop_patches(images, sizes, rois, 20)
    assert torch.equal(images, before)
    for patch, roi in zip(together, rois, strict=True):
        alone = own[int(roi[0])][None]
        roi = torch.cat((torch.zeros(1), roi[1:]))[None]
        torch.testing.assert_close(patch[None], crop_patches(alone, [alone.shape[2:]], roi, 20))
    assert together.max() <= 1


def test_the_loss_is_one_minus_the_cosine():
    ours = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 2.0]])
    theirs = torch.tensor([[6.0, 8.0], [0.0, 5.0], [-1.0, -1.0]])  # cosines 1, 0, -1
    assert mimic_loss(ours, theirs, 2, "sum").item() == pytest.approx((0 + 1 + 2) / 2)
    assert mimic_loss(ours, theirs, 2, "mean").item() == pytest.approx((0 + 1 + 2) / 3)
    assert mimic_loss(ours[:0], theirs[:0], 2, "mean").item() == 0
    with pytest.raises(ValueError, match="'max'"):
        mimic_loss(ours, theirs, 2, "max")


def test_the_loss_pulls_at_both_sides_in_float32():
    ours, theirs = torch.rand(4, 8).bfloat16(), torch.rand(4, 8).bfloat16()
    ours.requires_grad_(), theirs.requires_grad_()
    loss = mimic_loss(ours, theirs, 1, "sum")
    assert loss.dtype == torch.float32
    loss.backward()
    assert ours.grad.abs().sum() > 0
    assert theirs.grad.abs().sum() > 0
    exact = (1 - F.cosine_similarity(ours.double(), theirs.double())).sum()
    assert loss.item() == pytest.approx(exact.item(), abs=1e-6)

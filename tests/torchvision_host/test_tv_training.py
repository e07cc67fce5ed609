from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

pytest.importorskip("lightning")
pytest.importorskip("torchmetrics")

import d2det.torchvision as models
from d2det.torchvision.__main__ import arguments, main
from d2det.torchvision.data import CocoBoxes, collate


def write_coco(folder, annotations, number=2, size=(60, 40)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(1, number + 1):
        Image.new("RGB", size, (50 * i, 20, 30)).save(folder / f"{i}.png")
    coco = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": size[0], "height": size[1]}
            for i in range(1, number + 1)
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 90, "name": "dog"}],
        "annotations": [
            {"id": i, "iscrowd": 0, "area": 100, **a} for i, a in enumerate(annotations, 1)
        ],
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(coco))
    return path


@pytest.fixture
def coco(tmp_path):
    boxes = [
        {"image_id": 1, "category_id": 90, "bbox": [10, 5, 20, 30]},
        {"image_id": 1, "category_id": 7, "bbox": [30, 5, 100, 10]},  # beyond the border
        {"image_id": 1, "category_id": 7, "bbox": [5, 5, 0, 10]},  # no area
        {"image_id": 1, "category_id": 7, "bbox": [5, 5, 9, 10], "iscrowd": 1},
    ]
    return write_coco(tmp_path / "coco", boxes)


def test_targets_are_torchvisions(coco):
    data = CocoBoxes(coco, coco.parent, train=False)
    assert len(data) == 2 and data.class_names == ["cat", "dog"]
    image, target = data[0]
    assert image.shape == (3, 40, 60) and image.dtype == torch.float32
    assert image[0, 0, 0] == pytest.approx(50 / 255)
    assert target["boxes"].tolist() == [[10, 5, 30, 35], [30, 5, 60, 15]]
    assert target["labels"].tolist() == [2, 1]
    assert type(target["boxes"]) is torch.Tensor
    _, empty = data[1]
    assert empty["boxes"].shape == (0, 4) and empty["labels"].dtype == torch.int64


def test_training_leaves_out_empty_images_and_flips(coco):
    data = CocoBoxes(coco, coco.parent, train=True)
    assert len(data) == 1
    torch.manual_seed(0)
    seen = {tuple(data[0][1]["boxes"][0].tolist()) for _ in range(12)}
    assert seen == {(10, 5, 30, 35), (30, 5, 50, 35)}


def test_bad_data_is_named(coco, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CocoBoxes(coco, tmp_path / "nowhere", train=False)
    empty = write_coco(tmp_path / "empty", [])
    with pytest.raises(ValueError, match="no image of .* has an object"):
        CocoBoxes(empty, empty.parent, train=True)


def test_half_of_the_paths_is_refused(capsys):
    with pytest.raises(SystemExit):
        arguments(["--train-json", "a.json"])
    assert "come together" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_train_evaluate_resume(tiny, coco, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "d2det_quickstart", lambda num_classes: tiny(num_classes))
    output = tmp_path / "run"
    paths = ["--train-json", coco, "--train-images", coco.parent]
    paths += ["--val-json", coco, "--val-images", coco.parent]
    common = [*map(str, paths), "--output", str(output), "--batch-size", "2", "--num-pictures", "1"]
    main([*common, "--max-steps", "2"])
    results = json.loads((output / "results.json").read_text())
    names = {"AP", "AP50", "AP75", "AP-cat", "AP-dog"}
    assert {f"bbox/{name}" for name in names} == set(results)
    assert 0 <= results["bbox/AP"] <= 100
    assert [p.name for p in (output / "pictures").iterdir()] == ["1.png"]
    assert "AP50" in capsys.readouterr().out
    weights = torch.load(output / "model_final.pth")
    assert set(weights) == set(tiny(3).state_dict())
    with pytest.raises(SystemExit, match="--resume"):
        main([*common, "--max-steps", "2"])
    main([*common, "--max-steps", "3", "--resume"])
    with pytest.raises(SystemExit, match="no .*last.ckpt to resume"):
        main([*common, "--output", str(tmp_path / "new"), "--resume"])
    checkpoint = torch.load(output / "last.ckpt", weights_only=False)
    assert checkpoint["global_step"] == 3


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_masks_are_evaluated_too(tiny, tmp_path, monkeypatch, mask_settings):
    polygon = [[10, 5, 30, 5, 30, 35, 10, 35]]
    box = {"image_id": 1, "category_id": 7, "bbox": [10, 5, 20, 30], "segmentation": polygon}
    coco = write_coco(tmp_path / "coco", [box])
    data = CocoBoxes(coco, coco.parent, train=False, masks=True)
    assert data[0][1]["masks"].sum() == 20 * 30 and data[1][1]["masks"].shape == (0, 40, 60)
    monkeypatch.setattr(
        models,
        "d2det_quickstart",
        lambda num_classes, masks: tiny(num_classes, masks=mask_settings),
    )
    output = tmp_path / "run"
    paths = ["--train-json", coco, "--train-images", coco.parent]
    paths += ["--val-json", coco, "--val-images", coco.parent, "--output", output]
    main([*map(str, paths), "--masks", "--max-steps", "1", "--num-pictures", "1"])
    results = json.loads((output / "results.json").read_text())
    assert {"bbox/AP", "segm/AP", "segm/AP-cat"} <= set(results)
    assert all(value is None or 0 <= value <= 100 for value in results.values())


def test_objects_without_masks_are_named(coco):
    with pytest.raises(ValueError, match="have no segmentation, the first with id 1"):
        CocoBoxes(coco, coco.parent, train=False, masks=True)


def test_batches_are_lists():
    batch = [(torch.zeros(3, 4, 5), {"labels": 1}), (torch.zeros(3, 6, 7), {"labels": 2})]
    images, targets = collate(batch)
    assert [i.shape[1] for i in images] == [4, 6] and [t["labels"] for t in targets] == [1, 2]

"""demo.py: images, folders, globs and videos in; pictures and COCO-style JSON out."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

pytest.importorskip("detectron2")
from pycocotools.coco import COCO


@pytest.fixture
def photos(tmp_path):
    """A folder with three images of different kinds and a text file."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / "a.png"), image)
    cv2.imwrite(str(folder / "b.jpg"), image[:50])
    cv2.imwrite(str(folder / "c.png"), np.full((40, 40), 200, np.uint8))
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def video(tmp_path):
    """Five frames of 64 x 48 at 10 frames a second."""
    path = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 48))
    rng = np.random.default_rng(1)
    for _ in range(5):
        writer.write(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    writer.release()
    return path


@pytest.fixture
def demo(program, finished_run, tmp_path):
    """A function that runs demo.py with a tiny detector and returns (output folder, JSON)."""
    module = program("demo")

    def run(*args, weights=finished_run):
        output = tmp_path / "out"
        line = ["--weights", weights, "--output", output, *args]
        module.main([str(item) for item in line])
        return output, json.loads((output / "detections.json").read_text())

    return run


def test_folder(demo, photos, capsys):
    output, content = demo("--score-thresh", 0.2, "--input", photos)
    assert sorted(p.name for p in output.iterdir()) == [
        "a.jpg",
        "b.jpg",
        "c.jpg",
        "detections.json",
    ]
    assert [(i["id"], i["height"], i["width"]) for i in content["images"]] == [
        (1, 60, 90),
        (2, 50, 90),
        (3, 40, 40),
    ]
    assert content["images"][0]["file_name"] == str(photos / "a.png")
    assert content["categories"] == [
        {"id": 1, "name": "red"},
        {"id": 2, "name": "green"},
        {"id": 3, "name": "blue"},
    ]
    assert content["annotations"]
    for found in content["annotations"]:
        assert found["score"] >= 0.2
        assert found["category_name"] == ["red", "green", "blue"][found["category_id"] - 1]
        x, y, w, h = found["bbox"]
        image = content["images"][found["image_id"] - 1]
        assert 0 <= x <= x + w <= image["width"] + 0.01
        assert 0 <= y <= y + h <= image["height"] + 0.01
    assert "3 images" in capsys.readouterr().out


def test_detections_are_the_predictors(demo, photos, finished_run):
    from d2det import Predictor

    _, content = demo("--input", photos / "a.png")
    wanted = Predictor(None, finished_run, score_threshold=0.3)(photos / "a.png")["instances"]
    boxes = np.array([found["bbox"] for found in content["annotations"]])
    boxes[:, 2:] += boxes[:, :2]
    assert len(boxes) > 0
    np.testing.assert_allclose(boxes, wanted.pred_boxes.tensor, atol=0.02)
    assert [a["category_id"] - 1 for a in content["annotations"]] == wanted.pred_classes.tolist()


def test_json_loads_as_coco(demo, photos):
    output, content = demo("--score-thresh", 0, "--input", photos)
    coco = COCO(output / "detections.json")
    assert len(coco.getAnnIds(imgIds=[1])) == sum(
        a["image_id"] == 1 for a in content["annotations"]
    )


def test_masks_are_in_the_json(program, tmp_path):
    import torch
    from detectron2.structures import Boxes, Instances
    from pycocotools import mask as mask_util

    results = program("demo").Results(tmp_path, ["red"])
    found = Instances((20, 30), pred_boxes=Boxes(torch.tensor([[2.0, 3.0, 12.0, 8.0]])))
    found.scores, found.pred_classes = torch.tensor([0.5]), torch.tensor([0])
    found.pred_masks = torch.zeros(1, 20, 30, dtype=torch.bool)
    found.pred_masks[0, 3:8, 2:12] = True
    found.mask_scores = torch.tensor([0.75])
    results.add("x.png", np.zeros((20, 30, 3), np.uint8), found)
    results.add("empty.png", np.zeros((20, 30, 3), np.uint8), found[:0])
    annotation = json.loads(results.write().read_text())["annotations"][0]
    assert annotation["bbox"] == [2, 3, 10, 5]
    assert annotation["area"] == 50
    assert annotation["mask_score"] == 0.75
    assert (mask_util.decode(annotation["segmentation"]) == found.pred_masks[0].numpy()).all()


def test_glob_and_same_names(demo, photos, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.png").write_bytes((photos / "a.png").read_bytes())
    output, content = demo("--input", photos / "*.png", other, photos / "a.png")
    assert len(content["images"]) == 3  # the repeated file once
    assert sorted(p.name for p in output.glob("*.jpg")) == ["a.jpg", "a_2.jpg", "c.jpg"]


def test_video(demo, video):
    output, content = demo("--score-thresh", 0.2, "--batch-size", 2, "--input", video)
    assert [image["frame"] for image in content["images"]] == [0, 1, 2, 3, 4]
    assert content["images"][3]["seconds"] == pytest.approx(0.3)
    assert {found["image_id"] for found in content["annotations"]} == {1, 2, 3, 4, 5}
    capture = cv2.VideoCapture(str(output / "clip.mp4"))
    frames = [capture.read() for _ in range(6)]
    assert [there for there, _ in frames] == [True] * 5 + [False]
    assert frames[0][1].shape == (48, 64, 3)
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(10)


def test_image_of_one_color_and_nothing_detected(demo, photos):
    output, content = demo("--score-thresh", 1.01, "--input", photos / "c.png")
    assert content["annotations"] == []
    drawn = cv2.imread(str(output / "c.jpg"))
    assert drawn.shape == (400, 400, 3)  # enlarged
    assert np.abs(drawn.astype(int) - 200).max() <= 3


def test_unreadable_inputs_are_skipped_and_counted(demo, photos, capsys):
    (photos / "broken.jpg").write_bytes(b"\xff\xd8 not an image")
    (photos / "broken.mp4").write_bytes(b"nor a video")
    _, content = demo("--input", photos)
    assert len(content["images"]) == 3
    captured = capsys.readouterr()
    assert "2 inputs skipped" in captured.out
    assert "broken.jpg cannot be read" in captured.err
    assert "broken.mp4 cannot be read as a video" in captured.err


def test_overrides_and_named_config(demo, photos, tiny_yaml, finished_run):
    line = ["--config-file", tiny_yaml, "--score-thresh", 0, "--input", photos / "a.png"]
    limited = ["--output", finished_run.parent / "out", "--opts", "TEST.DETECTIONS_PER_IMAGE", 2]
    _, content = demo(*line, *limited)
    assert len(content["annotations"]) == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--input", "{photos}/none*.jpg"], "no image or video there"),
        (["--input", "{photos}/notes.txt"], "none of the inputs could be read"),
        (["--input", "{photos}", "--output", "{photos}"], "holds inputs"),
        (["--input", "{photos}", "--weights", "none.pth"], "none.pth do not exist"),
        (["--input", "{photos}", "--config-file", "quickstrat"], "did you mean quickstart"),
        (
            ["--input", "{photos}", "--device", "cpu", "--opts", "SED", "1"],
            "unknown config key SED",
        ),
    ],
)
def test_bad_input(demo, photos, args, message):
    with pytest.raises(SystemExit) as end:
        demo(*(arg.format(photos=photos) for arg in args))
    assert str(end.value.code).startswith("error: ")
    assert message in end.value.code


def test_needed_options(program, capsys):
    for line, message in (
        (["--weights", "x"], "--input or --webcam"),
        (["--input", "x"], "--weights or --config-file"),
    ):
        with pytest.raises(SystemExit):
            program("demo").main(line)
        assert message in capsys.readouterr().err


def test_masks_and_their_scores_are_drawn_on_images_and_frames(demo, photos, video, monkeypatch):
    """Of a model that has them; on the last frame it finds nothing."""
    import torch

    from d2det.engine.predictor import Predictor
    from d2det.evaluation import drawing

    predict, drawn, frames = Predictor.__call__, [], []

    def with_masks(self, images):
        outputs = predict(self, images)
        for output, image in zip(outputs, images, strict=True):
            frames.append(image.shape)
            found = output["instances"][: 0 if len(frames) == 6 else None]
            height, width = image.shape[:2]
            found.pred_masks = torch.zeros(len(found), height, width, dtype=torch.bool)
            for mask, box in zip(found.pred_masks, found.pred_boxes.tensor.int(), strict=True):
                mask[box[1] : box[3], box[0] : box[2]] = True
            found.mask_scores = found.scores + 0.3
            output["instances"] = found
        return outputs

    def record(image, boxes, classes, labels, masks=None):
        drawn.append((labels, masks))
        return drawing.draw_objects(image, boxes, classes, labels, masks)

    monkeypatch.setattr(Predictor, "__call__", with_masks)
    monkeypatch.setattr("d2det.engine.predictor.draw_objects", record)
    _, content = demo("--score-thresh", 0.2, "--input", photos / "a.png", video)
    assert len(drawn) == len(content["images"]) == 6
    assert [len(labels) for labels, _ in drawn][-1] == 0 < len(drawn[0][0])
    for labels, masks in drawn:
        assert all(label.count(" | ") == 1 for label in labels)
        assert len(masks) == len(labels)
    for found in content["annotations"]:
        assert found["mask_score"] == pytest.approx(found["score"] + 0.3, abs=1e-4)
        assert found["segmentation"]["size"] == [
            content["images"][found["image_id"] - 1][side] for side in ("height", "width")
        ]

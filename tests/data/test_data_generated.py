"""The generated data set on disk: deterministic, complete or absent, and in COCO's format."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2")
cv2 = pytest.importorskip("cv2")

from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402
from pycocotools.cocoeval import COCOeval  # noqa: E402

from d2det.data import generated, generated_names  # noqa: E402
from d2det.data.generated import generate_image, main, write_dataset  # noqa: E402

SMALL = {"num_images": 4, "size": 96, "seed": 3}


def contents(json_file):
    folder = json_file.parent
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def test_same_seed_gives_the_same_bytes(tmp_path):
    a = contents(write_dataset(tmp_path / "a", "train", **SMALL))
    b = contents(write_dataset(tmp_path / "b", "train", **SMALL))
    assert sorted(a) == [f"images/{i:06d}.jpg" for i in range(1, 5)] + ["instances_train.json"]
    assert a == b


def test_an_image_depends_on_seed_split_and_number_only():
    image, annotations = generate_image(3, "train", 1, 96)
    again, same = generate_image(3, "train", 1, 96)
    np.testing.assert_array_equal(image, again)
    assert annotations == same
    for other in [(4, "train", 1), (3, "val", 1), (3, "train", 2)]:
        assert generate_image(*other, 96)[1] != annotations


def test_version_stands_for_what_is_drawn():
    # Fails when a changed generator would mix with files of the old one: then raise VERSION, and
    # put the new numbers here.
    image, annotations = generate_image(0, "train", 0, 192)
    assert generated.VERSION == 1
    assert image.shape == (202, 172, 3)
    assert [a["category_id"] for a in annotations] == [4, 4, 5, 1, 4]
    np.testing.assert_allclose(annotations[0]["bbox"], [0.0, 45.67, 172.0, 156.33], atol=0.05)
    np.testing.assert_allclose(image.mean((0, 1)), [119.0, 141.0, 130.0], atol=0.5)


def test_version_stands_for_the_deformed_ones_too():
    image, annotations = generate_image(0, "train", 0, 192, "shapes_deformed")
    assert generated.VERSION == 1
    assert image.shape == (197, 220, 3)
    assert [a["category_id"] for a in annotations] == [3, 3, 5]
    np.testing.assert_allclose(annotations[0]["bbox"], [31.14, 0.0, 188.86, 112.7], atol=0.05)
    np.testing.assert_allclose(image.mean((0, 1)), [181.6, 165.0, 172.3], atol=0.5)


def test_every_setting_has_a_folder_of_its_own(tmp_path):
    first = write_dataset(tmp_path, "train", **SMALL)
    for change in ({"num_images": 2}, {"size": 64}, {"seed": 4}, {"dataset": "shapes_deformed"}):
        assert write_dataset(tmp_path, "train", **{**SMALL, **change}) != first
    assert f"v{generated.VERSION}" in str(first)


def test_a_complete_data_set_is_not_drawn_again(tmp_path, monkeypatch):
    json_file = write_dataset(tmp_path, "val", **SMALL)
    monkeypatch.setattr(generated, "generate_image", None)
    assert write_dataset(tmp_path, "val", **SMALL) == json_file


def test_an_interrupted_run_leaves_nothing_and_starts_again(tmp_path, monkeypatch):
    wanted = contents(write_dataset(tmp_path / "whole", "train", **SMALL))
    folder = generated.dataset_folder(tmp_path, "train", **SMALL)

    def stop_at_third(seed, split, index, size, dataset):
        if index == 2:
            raise KeyboardInterrupt
        return generate_image(seed, split, index, size, dataset)

    monkeypatch.setattr(generated, "generate_image", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, "train", **SMALL)
    assert not folder.exists()
    (folder.with_name(folder.name + ".partial") / "images" / "stray.jpg").write_bytes(b"x")
    monkeypatch.undo()
    assert contents(write_dataset(tmp_path, "train", **SMALL)) == wanted


def test_a_folder_without_json_is_replaced(tmp_path):
    folder = generated.dataset_folder(tmp_path, "train", **SMALL)
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "old.jpg").write_bytes(b"x")
    assert "images/old.jpg" not in contents(write_dataset(tmp_path, "train", **SMALL))


def _write(root, queue):
    written = []
    inner = generated.generate_image
    generated.generate_image = lambda *a: written.append(1) or inner(*a)
    path = write_dataset(root, "train", **SMALL)
    queue.put((str(path), len(written), len(json.loads(path.read_text())["images"])))


def test_two_processes_at_once_draw_once(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_write, args=(tmp_path, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert results[0][0] == results[1][0]
    assert sorted(drawn for _, drawn, _ in results) == [0, SMALL["num_images"]]
    assert all(found == SMALL["num_images"] for _, _, found in results)


@pytest.fixture(scope="module", params=["shapes", "shapes_deformed"])
def json_file(tmp_path_factory, request):
    root = tmp_path_factory.mktemp("shapes")
    return write_dataset(root, "val", num_images=12, size=96, seed=1, dataset=request.param)


def test_json_agrees_with_the_images(json_file):
    content = json.loads(json_file.read_text())
    assert [a["id"] for a in content["annotations"]] == list(
        range(1, len(content["annotations"]) + 1)
    )
    sizes = {}
    for image in content["images"]:
        picture = cv2.imread(str(json_file.parent / "images" / image["file_name"]))
        assert picture.shape == (image["height"], image["width"], 3)
        assert picture.std() > 5
        sizes[image["id"]] = image["width"], image["height"]
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        limit = sizes[annotation["image_id"]]
        assert min(x, y) >= 0
        assert x + width <= limit[0] + 0.01
        assert y + height <= limit[1] + 0.01
        assert 0 < annotation["area"] <= width * height + 0.1


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_ground_truth_as_detections_reaches_ap_1(json_file, kind):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(json_file))
        keys = ("image_id", "category_id", kind if kind == "bbox" else "segmentation")
        found = [{**{k: a[k] for k in keys}, "score": 0.9} for a in truth.anns.values()]
        if kind == "segm":
            for detection in found:
                annotation = {**detection, "image_id": detection["image_id"]}
                detection["segmentation"] = truth.annToRLE(annotation)
        evaluation = COCOeval(truth, truth.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_objects_stand_out_from_what_surrounds_them(json_file):
    """A detector can only learn what can be seen: colours differ across most outlines."""
    content = json.loads(json_file.read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    steps = []
    for annotation in content["annotations"]:
        picture = cv2.imread(str(json_file.parent / "images" / names[annotation["image_id"]]))
        outline = np.reshape(annotation["segmentation"][0], (-1, 2))
        inside = np.zeros(picture.shape[:2], np.uint8)
        cv2.fillPoly(inside, [outline.round().astype(np.int32)], 1)
        near = cv2.dilate(inside, np.ones((7, 7), np.uint8)) - inside
        if inside.sum() and near.sum():
            step = picture[inside > 0].mean(0) - picture[near > 0].mean(0)
            steps.append(np.abs(step).max())
    assert np.mean(np.array(steps) > 8) > 0.8


@pytest.fixture
def registered(tmp_path, monkeypatch):
    monkeypatch.setattr(generated_names, "SPLITS", {"train": 3, "val": 2})
    monkeypatch.setattr(generated_names, "DEFAULT_SIZE", 64)
    generated_names.register_generated(tmp_path / "shapes")
    yield tmp_path / "shapes"
    monkeypatch.undo()
    generated_names.register_generated()


def test_registered_names_are_drawn_on_first_access(registered):
    assert not registered.exists()
    metadata = MetadataCatalog.get("shapes_train")
    assert metadata.thing_classes == list(generated.CLASSES)
    records = DatasetCatalog.get("shapes_train")
    assert len(records) == 3
    assert registered.exists()
    assert all(set(r) >= {"file_name", "height", "width", "annotations"} for r in records)
    assert COCO(metadata.json_file).getCatIds() == list(metadata.thing_dataset_id_to_contiguous_id)
    assert len(DatasetCatalog.get("shapes_val")) == 2
    assert len(DatasetCatalog.get("shapes_deformed_val")) == 2
    assert "shapes_deformed" in MetadataCatalog.get("shapes_deformed_val").json_file


def test_names_are_registered_by_the_import():
    names = {"shapes_train", "shapes_val", "shapes_deformed_train", "shapes_deformed_val"}
    assert names <= set(DatasetCatalog.list())


def test_command_line(tmp_path, capsys):
    main(["--root", str(tmp_path), "--split", "val", "--num-images", "1", "--size", "64"])
    out = capsys.readouterr().out.strip()
    assert out.endswith("instances_val.json")
    assert len(json.loads(Path(out).read_text())["images"]) == 1
    small = ["--num-images", "1", "--size", "64"]
    main(["--dataset", "shapes_deformed", "--root", str(tmp_path), "--split", "val", *small])
    other = capsys.readouterr().out.strip()
    assert other != out
    assert "shapes_deformed" in json.loads(Path(other).read_text())["info"]["description"]


def test_an_unknown_data_set(tmp_path):
    with pytest.raises(ValueError, match="'stars'; choose one of .*shapes_deformed"):
        write_dataset(tmp_path, "train", **SMALL, dataset="stars")


@pytest.mark.parametrize(
    "change", [{"num_images": 0}, {"size": 10}, {"seed": -1}, {"split": "../x"}]
)
def test_bad_settings(tmp_path, change):
    options = {"split": "train", **SMALL, **change}
    with pytest.raises(ValueError, match="generated data set needs"):
        write_dataset(tmp_path, options.pop("split"), **options)

"""Any COCO-format data set: what is accepted, what is mended, and what each fault is answered."""

from __future__ import annotations

import copy
import itertools
import json
import logging

import numpy as np
import pytest

pytest.importorskip("detectron2")

import pycocotools.mask as mask_util
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image

from d2det.data import coco_images
from d2det.data.coco import register_coco

SQUARE = [[10, 10, 20, 10, 20, 20, 10, 20]]
_numbers = itertools.count()


def entry(number, image_id, box, category=7, **more):
    base = {"id": number, "image_id": image_id, "category_id": category, "bbox": list(box)}
    return {**base, "area": box[2] * box[3], "iscrowd": 0, **more}


@pytest.fixture
def data(tmp_path):
    """Three images of 40 x 30; ids with gaps; categories unsorted, one of them unused."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(3):
        pixels = rng.integers(0, 255, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    images = [
        {"id": 10 * i + 5, "file_name": f"{i}.png", "width": 40, "height": 30} for i in range(3)
    ]
    return {
        "images": images,
        "annotations": [
            entry(11, 5, (1, 2, 10, 8), 9),
            entry(4, 5, (5, 5, 20, 20)),
            entry(90, 15, (0, 0, 40, 30), 2),
        ],
        "categories": [
            {"id": 9, "name": "nine"},
            {"id": 2, "name": "two"},
            {"id": 7, "name": "seven"},
            {"id": 50, "name": "unused"},
        ],
    }


@pytest.fixture
def names():
    made = []

    def make():
        made.append(f"coco_test_{next(_numbers)}")
        return made[-1]

    yield make
    for name in made:
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@pytest.fixture
def register(tmp_path, names):
    def run(content, name=None, **options):
        json_file = tmp_path / "data.json"
        json_file.write_text(content if isinstance(content, str) else json.dumps(content))
        name = name or names()
        return name, register_coco(name, json_file, tmp_path / "images", **options)

    return run


def evaluate(name, output_dir, records, boxes_of):
    """What detectron2's own evaluator makes of `boxes_of` each record."""
    evaluator = COCOEvaluator(name, ("bbox",), distributed=False, output_dir=str(output_dir))
    evaluator.reset()
    for record in records:
        found = boxes_of(record)
        instances = Instances((record["height"], record["width"]))
        xywh = torch.tensor([a["bbox"] for a in found]).reshape(-1, 4)
        instances.pred_boxes = Boxes(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1))
        instances.scores = torch.ones(len(found))
        instances.pred_classes = torch.tensor([a["category_id"] for a in found], dtype=torch.int64)
        evaluator.process([record], [{"instances": instances}])
    return evaluator.evaluate()


def test_ids_are_numbered_in_their_order(data, register, caplog):
    name, count = register(data, purpose="train")
    metadata = MetadataCatalog.get(name)
    assert count == 4
    assert metadata.thing_classes == ["two", "seven", "nine", "unused"]
    assert metadata.thing_dataset_id_to_contiguous_id == {2: 0, 7: 1, 9: 2, 50: 3}
    records = DatasetCatalog.get(name)
    assert [r["image_id"] for r in records] == [5, 15, 25]
    assert [a["category_id"] for a in records[0]["annotations"]] == [2, 1]
    assert records[2]["annotations"] == []  # an image without objects is worth training on
    assert metadata.has_masks is False
    assert not caplog.records


def test_detectron2_evaluates_and_maps_back_to_the_ids_of_the_file(data, register, tmp_path):
    name, _ = register(data, purpose="test")
    records = DatasetCatalog.get(name)
    results = evaluate(name, tmp_path / "out", records, lambda r: r["annotations"])
    assert results["bbox"]["AP"] == pytest.approx(100.0)
    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert sorted(x["category_id"] for x in written) == [2, 7, 9]


def test_a_test_set_without_annotations_is_predicted_and_written(data, register, tmp_path):
    del data["annotations"]
    name, count = register(data, purpose="test")
    records = DatasetCatalog.get(name)
    assert count == 4
    assert len(records) == 3
    assert MetadataCatalog.get(name).has_annotations is False
    box = {"bbox": [1.0, 2.0, 3.0, 4.0], "category_id": 3}
    assert not evaluate(name, tmp_path / "out", records, lambda r: [box])
    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert [x["category_id"] for x in written] == [50, 50, 50]


def test_without_categories_they_are_another_data_sets(data, register, names, tmp_path):
    train, _ = register(data, purpose="train")
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps({"images": data["images"]}))
    assert register_coco(names(), bare, tmp_path / "images", purpose="test") == 0
    name = names()
    assert register_coco(name, bare, tmp_path / "images", categories_of=train) == 4
    assert MetadataCatalog.get(name).thing_classes == MetadataCatalog.get(train).thing_classes


def test_faulty_boxes_are_dropped_and_counted_in_one_warning(data, register, caplog):
    data["annotations"] += [
        entry(100, 15, (5, 5, 0, 10)),
        entry(101, 15, (5, 5, 10, -3)),
        entry(102, 25, (50, 5, 10, 10)),  # beside the image
        entry(103, 25, (0, 0, 40, 30), iscrowd=1),
        entry(104, 5, (30, 20, 30, 5)),  # 20 pixels too far
        entry(105, 5, (30.5, 20, 10, 5)),  # half a pixel: rounding
        entry(106, 999, (1, 1, 5, 5)),
        entry(107, 5, (1, 1, 5, 5), ignore=1),
        entry(108, 5, (7, 3, 1, 20)),  # one pixel wide: thin, not empty
    ]
    with caplog.at_level(logging.WARNING):
        name, _ = register(data, purpose="train")
    assert len(caplog.records) == 1
    text = caplog.text
    for part in (
        "2 boxes without area",
        "1 boxes outside their image",
        "1 boxes marked 'ignore'",
        "1 annotations of images that are not listed",
        "1 boxes clipped",
        "1 images left out",
    ):
        assert part in text
    caplog.clear()
    records = DatasetCatalog.get(name)
    assert not caplog.records  # once, not at every access
    assert [r["image_id"] for r in records] == [5, 15]
    boxes = [a["bbox"] for a in records[0]["annotations"]]
    assert boxes[2:] == [[30, 20, 10, 5], [30.5, 20, 9.5, 5], [7, 3, 1, 20]]
    assert [a["bbox"] for a in records[1]["annotations"]] == [[0, 0, 40, 30]]


def test_a_test_set_keeps_all_its_images(data, register):
    data["annotations"] = [entry(1, 5, (50, 5, 10, 10)), entry(2, 15, (0, 0, 9, 9), iscrowd=1)]
    name, _ = register(data, purpose="test")
    assert len(DatasetCatalog.get(name)) == 3


def test_polygons_and_rle_go_through_detectron2s_mapper(data, register):
    canvas = np.zeros((30, 40), np.uint8, order="F")
    canvas[5:25, 5:25] = 1
    compressed = mask_util.encode(canvas)
    flat = canvas.ravel(order="F")
    runs = [len(list(group)) for _, group in itertools.groupby(flat)]  # starts with zeros
    assert flat[0] == 0
    rle = {"size": [30, 40], "counts": compressed["counts"].decode()}
    segmentations = [SQUARE, rle, {"size": [30, 40], "counts": runs}]
    for annotation, segmentation in zip(data["annotations"], segmentations, strict=True):
        annotation["segmentation"] = segmentation
    name, _ = register(data, purpose="train")
    metadata = MetadataCatalog.get(name)
    assert metadata.has_masks is True
    assert metadata.mask_format == "bitmask"
    mapper = DatasetMapper(
        is_train=True, augmentations=[], image_format="RGB",
        use_instance_mask=True, instance_mask_format="bitmask",
    )  # fmt: skip
    first, second, _ = (mapper(copy.deepcopy(r))["instances"] for r in DatasetCatalog.get(name))
    np.testing.assert_array_equal(first.gt_masks.tensor[1].numpy(), canvas.astype(bool))
    np.testing.assert_array_equal(second.gt_masks.tensor[0].numpy(), canvas.astype(bool))
    assert first.gt_masks.tensor[0].sum() == 100


def test_polygons_alone_need_no_other_format(data, register):
    for annotation in data["annotations"]:
        annotation["segmentation"] = SQUARE
    name, _ = register(data, purpose="train")
    assert MetadataCatalog.get(name).mask_format == "polygon"
    assert MetadataCatalog.get(name).has_masks is True


def test_objects_without_a_mask_keep_their_boxes_and_are_counted(data, register, caplog):
    data["annotations"][0]["segmentation"] = SQUARE
    data["annotations"][1]["segmentation"] = [[1, 1, 2, 2]]  # two points
    name, _ = register(data, purpose="train")
    assert "2 objects without a valid mask" in caplog.text
    metadata = MetadataCatalog.get(name)
    assert metadata.has_masks is True
    assert metadata.without_mask == pytest.approx(2 / 3)
    annotations = [a for r in DatasetCatalog.get(name) for a in r["annotations"]]
    assert len(annotations) == 3
    assert sum("segmentation" in a for a in annotations) == 1


def test_sizes_that_the_json_lacks_are_read_from_the_files(data, register, tmp_path):
    del data["images"][0]["width"]
    data["images"][1].update(width=0, height=0)
    turned = Image.new("RGB", (40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright: 30 wide, 40 high
    turned.save(tmp_path / "images" / "2.jpg", exif=exif)
    data["images"][2] = {"id": 25, "file_name": "2.jpg"}
    name, _ = register(data, purpose="train")
    sizes = [(r["width"], r["height"]) for r in DatasetCatalog.get(name)]
    assert sizes == [(40, 30), (40, 30), (30, 40)]


def test_the_same_content_may_be_registered_again(data, register):
    name, count = register(data)
    json_file = MetadataCatalog.get(name).json_file
    root = MetadataCatalog.get(name).image_root
    assert register_coco(name, json_file, root) == count
    data["annotations"].pop()
    with pytest.raises(ValueError, match="registered already"):
        register(data, name=name)


def fault(key, **changes):
    """A change of the first entry of a list of the JSON; None removes."""

    def apply(data):
        for field, value in changes.items():
            if value is None:
                del data[key][0][field]
            else:
                data[key][0][field] = value

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(images=[]), "lists no images"),
        (lambda d: d.pop("images"), "not in COCO's format: expected an object"),
        (lambda d: d.update(annotations={}), "'annotations' is not a list"),
        (lambda d: d.pop("annotations"), "holds no box to train on"),
        (lambda d: d.update(annotations=[entry(1, 5, (90, 9, 5, 5))]), "1 boxes outside"),
        (lambda d: d.pop("categories"), "has annotations but no 'categories'"),
        (fault("images", id=15), "image id 15 is used more than once"),
        (fault("images", file_name=None), "image number 1 of 3 has no 'file_name'"),
        (fault("annotations", id=4), "annotation id 4 is used more than once"),
        (fault("annotations", id=None), "annotation number 1 of 3 has no 'id'"),
        (fault("annotations", category_id=3), "annotation 11 of image 5 has the category id 3"),
        (fault("annotations", category_id=None), "category id None.*it has 2, 7, 9, 50"),
        (fault("annotations", bbox=[1, 2, 3]), r"'bbox' \[1, 2, 3\]; expected"),
        (fault("annotations", bbox=[1, 2, 3, float("nan")]), "'bbox'.*nan"),
        (fault("annotations", bbox=None), "'bbox' None"),
        (fault("categories", name=None), "category number 1 of 4 has no 'name'"),
        (fault("images", width=50), "is 40 x 30 pixels, but .*data.json says 50 x 30"),
    ],
)
def test_faults_of_the_json(data, register, change, message):
    change(data)
    with pytest.raises(ValueError, match=message):
        register(data, purpose="train")
    assert not any(name.startswith("coco_test_") for name in DatasetCatalog.list())


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "it is empty"), ('{"images": [', "line 1 column 13"), ("[1]", "found a list")],
)
def test_broken_json(register, tmp_path, text, message):
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match=message):
        register(text)


def test_missing_json(tmp_path, names):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        register_coco(names(), tmp_path / "nowhere.json", tmp_path)


def test_missing_folder(data, names, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(data))
    with pytest.raises(FileNotFoundError, match="elsewhere, the image folder of"):
        register_coco(names(), tmp_path / "a.json", tmp_path / "elsewhere")


def test_missing_images(data, register, tmp_path):
    (tmp_path / "images" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 3 images of .*1\.png; give the folder"):
        register(data)


def test_missing_images_whose_names_start_a_folder_higher(data, register, tmp_path):
    for image in data["images"]:
        image["file_name"] = "images/" + image["file_name"]
    with pytest.raises(FileNotFoundError, match=f"give {tmp_path} as image folder"):
        register(data)


def test_images_in_sub_folders(data, register, tmp_path):
    (tmp_path / "images" / "sub").mkdir()
    (tmp_path / "images" / "1.png").rename(tmp_path / "images" / "sub" / "1.png")
    data["images"][1]["file_name"] = "sub/1.png"
    assert register(data)[1] == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "are empty files: 1.png"), (b"no image at all", "cannot be read"), (None, "cannot be")],
)
def test_unreadable_images(data, register, tmp_path, content, message):
    path = tmp_path / "images" / "1.png"
    if content is None:  # cut short
        content = path.read_bytes()[:-200]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        register(data)
    assert "1.png" in str(caught.value)


def test_headers_of_all_images_are_read_in_sets_of_usual_size(
    data, register, tmp_path, monkeypatch
):
    monkeypatch.setattr(coco_images, "SAMPLE_SIZE", 0)
    (tmp_path / "images" / "1.png").write_bytes(b"no image at all")
    with pytest.raises(ValueError, match=r"1\.png.* cannot be read"):
        register(data)
    monkeypatch.setattr(coco_images, "HEADERS_UP_TO", len(data["images"]) - 1)
    register(data)


def test_unknown_purpose(data, register):
    with pytest.raises(ValueError, match="purpose"):
        register(data, purpose="validation")

"""Cutting: windows, annotations as iSAID's kit makes them, restarts, and what is refused."""

from __future__ import annotations

import json
import re
from collections import Counter

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from pycocotools.coco import COCO

from d2det.data import isaid
from d2det.data.columns import from_dense
from d2det.data.cut_annotations import Instance, Rules, cut_instances, read_instances
from d2det.data.patches import Grid, Window, parse_patch_name, patch_name
from d2det.tools import cut_patches


def by_image(content: dict) -> dict[str, list[dict]]:
    names = {image["id"]: image["file_name"] for image in content["images"]}
    found = {name: [] for name in names.values()}
    for annotation in content["annotations"]:
        found[names[annotation["image_id"]]].append(annotation)
    return found


def kit_windows(side: int, size: int, overlap: int) -> set[tuple[int, int]]:
    """As iSAID's kit steps along a side: windows that stick out are pushed back in."""
    starts = range(0, side, size - overlap)
    return {
        (start, start + size) if start + size <= side else (side - size, side) for start in starts
    }


@pytest.mark.parametrize(("size", "overlap"), [(800, 200), (100, 0), (64, 63), (7, 3)])
def test_windows_are_those_of_the_kit(size, overlap):
    for height in (size + 1, 2 * size, 3 * size - overlap, 3 * size + 5):
        for width in (size + 2, 2 * size - overlap):
            windows = Grid(size, overlap).windows(height, width)
            expected = {
                Window(x1, y1, x2, y2)
                for y1, y2 in kit_windows(height, size, overlap)
                for x1, x2 in kit_windows(width, size, overlap)
            }
            assert set(windows) == expected and len(windows) == len(expected)
            assert windows == sorted(windows, key=lambda w: (w.y1, w.x1))


def test_an_image_is_kept_whole_unless_both_sides_exceed():
    assert Grid().windows(800, 4000) == [Window(0, 0, 4000, 800)]
    assert len(Grid().windows(801, 4000)) > 1
    either = Grid(cut_when="either").windows(500, 1400)
    assert either == [Window(0, 0, 800, 500), Window(600, 0, 1400, 500)]
    assert Grid(cut_when="either").windows(800, 800) == [Window(0, 0, 800, 800)]


def test_unfit_grids_and_rules_are_refused():
    with pytest.raises(ValueError, match="cannot overlap by 800"):
        Grid(800, 800)
    with pytest.raises(ValueError, match='"both" or "either"'):
        Grid(cut_when="never")
    with pytest.raises(ValueError, match=r'"polygon" or "rle"'):
        Rules(masks="bitmask")
    with pytest.raises(ValueError, match=r"min_visible in \[0, 1\]"):
        Rules(min_visible=1.5)


def test_names_hold_the_window():
    window = Window(600, 0, 1400, 800)
    assert patch_name("P0000", window) == "P0000_0_800_600_1400.png"
    assert parse_patch_name("a/P0000_0_800_600_1400.png") == ("P0000", window)
    assert parse_patch_name("x_1_P0000_0_800_600_1400.png") == ("x_1_P0000", window)
    for name in ("P0000.png", "P0000_instance_id_RGB.png", "P0_5_5_0_9.png"):
        assert parse_patch_name(name) is None


@pytest.mark.parametrize("from_json", [True, False])
def test_patches_and_annotations_are_those_of_the_kit(isaid_raw, cut, from_json):
    """Against the masks cut first and traced then, as the kit does: objects of more than 10
    pixels, areas in pixels, contours through the border pixels."""
    content, path = cut(from_json=from_json)
    assert content["categories"] == isaid.categories()
    ids = [annotation["id"] for annotation in content["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    coco, found = COCO(str(path)), by_image(content)
    assert "P0007.png" in found  # 90 x 250: whole
    assert not any("P1527" in name for name in found)
    expected_names = {"P0007.png"}
    for stem in ("P0000", "P0001"):
        height, width = isaid_raw.labels[stem].shape
        windows = Grid(100, 30).windows(height, width)
        expected_names |= {patch_name(stem, window) for window in windows}
    assert set(found) == expected_names
    checked = 0
    for name, pieces in found.items():
        stem, window = parse_patch_name(name) or ("P0007", Window(0, 0, 250, 90))
        drawn = isaid_raw.labels[stem][window.y1 : window.y2, window.x1 : window.x2]
        expected = {}
        for number in np.unique(drawn[drawn > 0]).tolist():
            mask = (drawn == number).astype(np.uint8)
            contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            polygons = [c.ravel().astype(float).tolist() for c in contours if len(c) > 2]
            if from_json:  # contours have no holes
                mask = cv2.drawContours(mask.copy(), contours, -1, 1, -1)
                whole = (isaid_raw.labels[stem] == number).astype(np.uint8)
                outer, _ = cv2.findContours(whole, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
                whole = cv2.drawContours(whole.copy(), outer, -1, 1, -1)
                mask = whole[window.y1 : window.y2, window.x1 : window.x2]
                contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
                polygons = [c.ravel().astype(float).tolist() for c in contours if len(c) > 2]
            if mask.sum() <= 10 or not polygons:
                continue
            raster = mask_util.merge(mask_util.frPyObjects(polygons, *mask.shape))
            if mask_util.area(raster) == 0:
                continue
            category = isaid.CLASSES.index(isaid_raw.classes[stem][number - 1]) + 1
            box = [float(v) for v in cv2.boundingRect(mask)]
            expected[raster["counts"]] = (category, int(mask.sum()), box)
        rasters = {}
        for annotation in pieces:
            raster = coco.annToRLE(annotation)["counts"]
            area = annotation["area"]
            if from_json and annotation["visible"] == 1:  # as released: without the hole
                area = expected[raster][1]
            rasters[raster] = (annotation["category_id"], area, annotation["bbox"])
        assert rasters == expected
        checked += len(expected)
    assert checked > 100


def test_patches_show_their_part_of_image_and_masks(isaid_raw, cut, tmp_path):
    content, _ = cut()
    for image in content["images"]:
        source, window = image["patch_of"]["file_name"], Window(*image["patch_of"]["window"])
        for suffix in ("", isaid.CLASS_SUFFIX, isaid.INSTANCE_SUFFIX):
            whole = cv2.imread(str(isaid_raw.folder / source.replace(".png", f"{suffix}.png")))
            name = image["file_name"].replace(".png", f"{suffix}.png")
            patch = cv2.imread(str(tmp_path / "train" / "images" / name))
            np.testing.assert_array_equal(
                patch, whole[window.y1 : window.y2, window.x1 : window.x2]
            )
            assert patch.shape[:2] == (image["height"], image["width"])


@pytest.mark.parametrize("masks", ["polygon", "rle"])
def test_masks_are_exact_to_the_pixel(isaid_raw, cut, masks):
    """From the mask images, by COCO's rule: pieces are slices of the whole masks, with holes."""
    options = ("--masks", masks, "--no-pixel-contours", "--min-area", 1)
    content, path = cut(*options, from_json=False)
    coco, checked = COCO(str(path)), 0
    for name, pieces in by_image(content).items():
        stem, window = parse_patch_name(name) or ("P0007", Window(0, 0, 250, 90))
        drawn = isaid_raw.labels[stem][window.y1 : window.y2, window.x1 : window.x2]
        assert len(pieces) == len(np.unique(drawn[drawn > 0]))
        for annotation in pieces:
            kind = list if masks == "polygon" else dict
            assert isinstance(annotation["segmentation"], kind)
            mask = coco.annToMask(annotation)
            (number,) = set(drawn[mask > 0].tolist())
            np.testing.assert_array_equal(mask, drawn == number)
            whole = (isaid_raw.labels[stem] == number).sum()
            assert annotation["visible"] == pytest.approx(mask.sum() / whole, abs=1e-4)
            checked += 1
    assert checked > 100


def test_small_pieces_and_empty_patches(cut):
    every, _ = cut("--min-area", 1, "--masks", "rle")
    fewer, _ = cut("--min-area", 60, "--min-visible", 0.5, "--empty", "drop", "--masks", "rle")
    kept = [a for a in every["annotations"] if mask_util.area(a["segmentation"]) >= 60]
    kept = [a for a in kept if a["visible"] >= 0.5]
    strip = [
        [{k: v for k, v in a.items() if k not in ("id", "image_id")} for a in found]
        for found in (kept, fewer["annotations"])
    ]
    assert strip[0] == strip[1] and 0 < len(kept) < len(every["annotations"])
    assert all(by_image(fewer).values())
    assert len(fewer["images"]) == sum(
        any(a["image_id"] == image["id"] for a in kept) for image in every["images"]
    )


def test_boxes_without_masks_are_clipped():
    annotations = [
        {"id": 3, "category_id": 1, "bbox": [90.5, 10, 30, 20], "area": 555.0},
        {"id": 4, "category_id": 2, "bbox": [5, 5, 20.25, 10], "area": 77.0},
        {"id": 5, "category_id": 2, "bbox": [500, 5, 20, 10]},
    ]
    dropped = Counter()
    found = read_instances(annotations, 200, 300, Rules(), masks=False, dropped=dropped)
    assert dropped == {"outside of their image": 1}
    one, two = cut_instances(found, Window(0, 0, 100, 100), Rules(), dropped)
    assert one["bbox"] == [90.5, 10, 9.5, 20] and one["area"] == 190
    assert one["visible"] == pytest.approx(9.5 / 30, abs=1e-4)
    assert two["bbox"] == [5, 5, 20.25, 10] and two["area"] == 77 and two["visible"] == 1
    (late,) = cut_instances(found, Window(80, 0, 180, 100), Rules(), dropped)
    assert late["bbox"] == [10.5, 10, 30, 20] and late["source_id"] == 3


def test_an_object_that_is_not_cut_keeps_its_box_and_area():
    """As annotated, between pixels, and exactly: back in the image, the numbers are the same."""
    columns = from_dense(np.ones((8, 11))).shift(403, 617)
    box = (402.7, 616.9, 414.21, 625.43)
    instance = Instance(1, 0, box, 93.25, columns, 1)
    (piece,) = cut_instances([instance], Window(400, 600, 500, 700), Rules(), Counter())
    assert piece["area"] == 93.25
    assert piece["bbox"][0] + 400 == box[0] and piece["bbox"][1] + 600 == box[1]
    (cut_one,) = cut_instances([instance], Window(310, 600, 410, 700), Rules(), Counter())
    assert cut_one["bbox"] == [93.0, 17.0, 7.0, 8.0] and cut_one["area"] == 56


def test_crowd_regions_stay_crowd_and_rle():
    columns = from_dense(np.ones((20, 20)))
    crowd = Instance(1, 1, (0.0, 0.0, 20.0, 20.0), 400, columns, 1)
    (piece,) = cut_instances([crowd], Window(10, 0, 30, 20), Rules(), Counter())
    assert piece["iscrowd"] == 1 and piece["segmentation"]["size"] == [20, 20]
    assert piece["area"] == 200


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_second_run_does_nothing_whoever_did_the_first(cut, tmp_path, capsys, workers):
    _, path = cut("--workers", workers)
    text, whole = path.read_text(), (path.parent / "whole_train.json").read_text()
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "train" / "images").iterdir()}
    capsys.readouterr()
    cut()
    assert "3 images (3 of them done before)" in capsys.readouterr().out
    assert path.read_text() == text
    assert (path.parent / "whole_train.json").read_text() == whole
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "train" / "images").iterdir()}
    assert not list(tmp_path.rglob("*.partial"))


def test_a_damaged_patch_or_other_options_are_cut_again(cut, tmp_path, capsys):
    content, _ = cut()
    first = tmp_path / "train" / "images" / content["images"][0]["file_name"]
    good = first.read_bytes()
    first.write_bytes(good[:50])
    capsys.readouterr()
    cut()
    assert "(2 of them done before)" in capsys.readouterr().out and first.read_bytes() == good
    cut("--min-area", 40)
    assert "(0 of them done before)" in capsys.readouterr().out


def test_an_interrupted_run_goes_on(cut, tmp_path, capsys, monkeypatch):
    from d2det.data import cut_dataset

    true_cut, done = cut_dataset.cut, []

    def stop_at_third(job):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job)
        return true_cut(job)

    monkeypatch.setattr(cut_dataset, "cut", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        cut()
    assert not list((tmp_path / "train").glob("*.json"))
    monkeypatch.undo()
    cut()
    assert "(2 of them done before)" in capsys.readouterr().out


def test_the_whole_images_json_is_complete(isaid_raw, cut, tmp_path):
    cut()
    whole = json.loads((tmp_path / "train" / "whole_train.json").read_text())
    sizes = {i["file_name"]: (i["height"], i["width"]) for i in whole["images"]}
    assert sizes == {f"{s}.png": isaid_raw.labels[s].shape for s in ("P0000", "P0001", "P0007")}
    assert all(annotation["id"] > 0 for annotation in whole["annotations"])
    assert whole["categories"] == isaid.categories()


def test_a_test_set_has_no_annotations(cut, isaid_raw, tmp_path):
    content, _ = cut("--images-only", split="test", from_json=False)
    assert "annotations" not in content and len(content["images"]) > 10
    names = {p.name for p in (tmp_path / "test" / "images").iterdir()}
    assert not any("instance" in name for name in names)


# What is refused, and how.


def refused(capsys, *options) -> str:
    with pytest.raises(SystemExit) as stopped:
        cut_patches.main([str(option) for option in options])
    return str(stopped.value.code) + capsys.readouterr().err


@pytest.fixture
def changed(isaid_raw, tmp_path, capsys):
    """A function that cuts after changing the JSON, and returns the message."""

    def run(change, *options):
        content = json.loads(isaid_raw.json.read_text())
        change(content)
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(content))
        given = ("--json", path, "--images", isaid_raw.folder, "--output", tmp_path / "out")
        return refused(
            capsys, *given, "--split", "x", "--workers", 0, "--preset", "isaid", *options
        )

    return run


def test_unknown_classes_are_named(changed):
    def change(content):
        content["categories"][1]["name"] = "submarine"

    assert re.search(r"'submarine' is none of iSAID's classes \(ship, ", changed(change))

    def change_id(content):
        content["annotations"][5]["category_id"] = 99

    assert "annotation 5 has the category id 99" in changed(change_id)


def test_missing_and_truncated_images_are_named(changed, isaid_raw, tmp_path, capsys):
    def rename(content):
        content["images"][0]["file_name"] = "P9999.png"

    assert "1 of the 3 images" in changed(rename) and "P9999.png" in changed(rename)
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in isaid_raw.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    ids = folder / f"P0001{isaid.INSTANCE_SUFFIX}.png"
    ids.write_bytes(ids.read_bytes()[:-200])
    given = ("--images", folder, "--output", tmp_path / "o", "--split", "x", "--workers", 0)
    message = refused(capsys, *given, "--preset", "isaid")
    assert f"{ids} cannot be read" in message and "damaged or incomplete" in message
    ids.unlink()
    message = refused(capsys, *given, "--preset", "isaid")
    assert "1 of 6 mask images are not in" in message and "--images-only" in message
    picture = folder / "P0001.png"
    picture.write_bytes(picture.read_bytes()[:-200])
    message = refused(capsys, *given, "--images-only")
    assert f"{picture} cannot be read" in message


def test_annotations_outside_and_malformed_ones(changed, isaid_raw, tmp_path, capsys):
    def broken(content):
        content["annotations"][3]["bbox"] = [1, 2, None, 4]

    message = changed(broken)
    assert "P0000.png: annotation 3 has the 'bbox' [1, 2, None, 4]" in message

    def sized(content):
        content["annotations"][2]["segmentation"] = {"size": [9, 9], "counts": "Q2"}

    assert "annotation 2 has a mask of [9, 9] pixels" in changed(sized)
    content = json.loads(isaid_raw.json.read_text())
    content["annotations"][0]["segmentation"] = [[900, 900, 920, 900, 920, 920]]
    content["annotations"][0]["bbox"] = [900, 900, 20, 20]
    content["annotations"][1]["segmentation"] = []
    content["annotations"].append({**content["annotations"][2], "id": 10**6, "image_id": 77})
    path = tmp_path / "outside.json"
    path.write_text(json.dumps(content))
    given = ["--json", path, "--images", isaid_raw.folder, "--output", tmp_path / "o"]
    cut_patches.main([*map(str, given), "--split", "x", "--workers", "0", "--preset", "isaid"])
    out = capsys.readouterr().out
    assert "dropped: 1 outside of their image" in out
    assert "dropped: 1 without a valid mask" in out
    assert "1 annotations of images that" in out


def test_truncated_json_and_unfit_options(isaid_raw, tmp_path, capsys):
    path = tmp_path / "half.json"
    path.write_text(isaid_raw.json.read_text()[:300])
    given = ("--images", isaid_raw.folder, "--output", tmp_path, "--split", "x")
    assert "is not valid JSON" in refused(capsys, *given, "--json", path)
    assert "--json is needed" in refused(capsys, *given)
    assert "exclude each other" in refused(capsys, *given, "--json", path, "--images-only")
    assert "holds no image" in refused(
        capsys, "--images", tmp_path, "--output", tmp_path, "--split", "x", "--images-only"
    )
    assert "cannot overlap" in refused(capsys, *given, "--json", path, "--overlap", 900)


def test_images_of_one_name_are_refused(isaid_raw, tmp_path, capsys):
    folder = tmp_path / "twice"
    folder.mkdir()
    for name in ("a.png", "a.jpg"):
        cv2.imwrite(str(folder / name), np.zeros((5, 5, 3), np.uint8))
    given = ("--images", folder, "--output", tmp_path, "--split", "x", "--images-only")
    assert "several images are called a" in refused(capsys, *given)


def test_classes_by_colour_and_strangers_among_them():
    classes, ids = np.zeros((2, 6, 6, 3), np.uint8)
    ids[1:3, 1:3] = (0, 0, 200)  # 200 * 65536
    classes[1:3, 1:3] = isaid.COLOURS[13]
    classes[2, 2] = isaid.COLOURS[0]  # painted over
    ids[4, 4] = (9, 1, 0)  # 265: below the first instance
    ((category, columns),) = isaid.read_instances(classes, ids)
    assert category == 14 and columns.area == 4
    classes[1:3, 1:3] = (1, 2, 3)
    with pytest.raises(ValueError, match=r"instance at \(1, 1\) has the colour \(1, 2, 3\)"):
        isaid.read_instances(classes, ids)
    with pytest.raises(ValueError, match="differ in size"):
        isaid.read_instances(classes[:3], ids)
    classes[:] = 0
    assert isaid.read_instances(classes, ids) == []

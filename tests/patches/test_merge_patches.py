"""Merging: ground truth cut and merged back, and each rule on a drawn case."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pycocotools.mask as mask_util
import pytest

from d2det.data.columns import from_dense, to_rle
from d2det.data.patches import Grid, Window
from d2det.evaluation.merging import merge_image
from d2det.evaluation.patch_detections import Detection, MergeRules
from d2det.evaluation.patch_results import merge_results, read_patches
from d2det.evaluation.whole_images import evaluate
from d2det.tools import merge_patches

LEFT, RIGHT = Window(0, 0, 100, 100), Window(70, 0, 170, 100)
SIZE = (100, 170)


def found(box, window, *, score=1.0, category=1, mask=True) -> Detection:
    """A detector's view of a filled box of the whole image: what its patch shows of it."""
    x1, y1 = max(box[0], window.x1), max(box[1], window.y1)
    x2, y2 = min(box[2], window.x2), min(box[3], window.y2)
    columns = from_dense(np.ones((y2 - y1, x2 - x1))).shift(x1, y1) if mask else None
    return Detection(category, score, (float(x1), float(y1), float(x2), float(y2)), columns,
                     (window,), cut=False)  # fmt: skip


def boxes(detections) -> list[tuple]:
    return sorted(detection.box for detection in detections)


def merge(*detections, size=SIZE, **rules):
    return merge_image(detections, *size, MergeRules(**rules))


# Ground truth.


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--masks", "rle", "--min-area", 1),
        ("--no-pixel-contours", "--min-area", 1),
        ("--size", 70, "--overlap", 20, "--cut-when", "either"),
    ],
)
def test_truth_comes_back(isaid_raw, cut, tmp_path, capsys, options):
    """Objects wholly inside a patch to the pixel, and split ones in one piece: seen from outside,
    by COCO's own tools."""
    content, path = cut(*options, from_json=False)
    merged_file, whole_file = tmp_path / "merged.json", tmp_path / "train" / "whole_train.json"
    given = ("--ground-truth", "--patches", path, "--whole", whole_file, "--workers", 0)
    merge_patches.main([str(x) for x in (*given, "--output", merged_file)])
    report = capsys.readouterr().out
    merged, whole = (json.loads(file.read_text()) for file in (merged_file, whole_file))
    best = {}
    for annotation in content["annotations"]:
        image = content["images"][annotation["image_id"] - 1]["patch_of"]["image_id"]
        key = image, annotation["source_id"]
        best[key] = max(best.get(key, 0), annotation["visible"])
    sizes = {image["id"]: (image["height"], image["width"]) for image in whole["images"]}
    exact = {1: [0, 0], 0: [0, 0]}  # wholly inside or not: objects, returned exactly
    for annotation in whole["annotations"]:
        share = best.get((annotation["image_id"], annotation["source_id"]))
        if share is None:
            continue
        height, width = sizes[annotation["image_id"]]
        mask = annotation["segmentation"]
        if isinstance(mask, list):
            mask = mask_util.merge(mask_util.frPyObjects(mask, height, width))
        decoded = mask_util.decode(mask)
        same = [
            result
            for result in merged
            if result["image_id"] == annotation["image_id"]
            and result["category_id"] == annotation["category_id"]
            and (mask_util.decode(result["segmentation"]) == decoded).all()
        ]
        assert len(same) <= 1
        exact[int(share == 1)][0] += 1
        exact[int(share == 1)][1] += len(same)
        if share == 1:
            assert same[0]["bbox"] == annotation["bbox"]
    (inside, inside_exact), (split, split_exact) = exact[1], exact[0]
    assert inside_exact == inside >= 25 and split >= 5
    assert f"wholly inside a patch: {inside} objects, {inside} returned exactly" in report
    assert f"split: {split} objects, {split_exact} rejoined exactly" in report
    extra = len(merged) - inside - split
    assert f"pieces left over: {extra}" in report
    # What cutting dropped (slivers of up to 10 pixels) cannot come back; all else does.
    if "--min-area" in options:
        assert split_exact == split and extra == 0
    else:
        assert split_exact >= 0.8 * split and extra <= 1


# Rejoining.


def test_split_objects_are_rejoined_to_their_union():
    box = (20, 30, 160, 50)
    merged, counts = merge(found(box, LEFT, score=0.7), found(box, RIGHT, score=0.9))
    assert boxes(merged) == [box] and merged[0].score == 0.9
    assert merged[0].columns.area == 140 * 20 and not merged[0].cut
    assert counts == {"rejoined": 1, "pieces": 2}


@pytest.mark.parametrize("mask", [True, False])
def test_pieces_that_disagree_are_not_rejoined(mask):
    one = found((20, 30, 160, 50), LEFT, mask=mask)
    other = found((60, 38, 160, 58), RIGHT, mask=mask)
    # In the shared strip of 30 columns, rows 30 to 50 and 38 to 58: IoU 12 / 28.
    merged, counts = merge(one, other, join_iou=0.44, nms_iou=1.0, nms_ios=1.0)
    assert len(merged) == 2 and not counts
    assert len(merge(one, other, join_iou=0.42)[0]) == 1


def test_other_classes_and_uncut_detections_are_not_rejoined():
    box = (20, 30, 160, 50)
    assert len(merge(found(box, LEFT), found(box, RIGHT, category=2))[0]) == 2
    apart = found((20, 30, 92, 50), LEFT), found((78, 30, 160, 50), RIGHT)
    merged, counts = merge(*apart, nms_iou=1.0)  # each ends inside its own patch
    assert len(merged) == 2 and counts["rejoined"] == 0


def test_an_object_over_a_corner_and_a_long_one_are_rejoined_from_all_patches():
    windows = Grid(100, 30).windows(170, 240)
    box = (60, 60, 120, 120)
    seen = [
        w for w in windows if w.x1 < box[2] and w.x2 > box[0] and w.y1 < box[3] and w.y2 > box[1]
    ]
    assert len(seen) == 4
    merged, counts = merge(*(found(box, w) for w in seen), size=(170, 240))
    assert boxes(merged) == [box] and merged[0].columns.area == 3600
    long = (5, 20, 235, 30)
    row = [w for w in windows if w.y1 == 0]
    merged, counts = merge(*(found(long, w) for w in row), size=(170, 240))
    assert boxes(merged) == [long] and counts == {"rejoined": 1, "pieces": 3}
    for order in itertools.permutations(found(long, w) for w in row):
        assert boxes(merge(*order, size=(170, 240))[0]) == [long]


def test_patches_that_only_touch_rejoin_along_their_common_side():
    left, right = Window(0, 0, 85, 100), Window(85, 0, 170, 100)
    box, other = (20, 30, 160, 50), (20, 60, 160, 80)
    pieces = [found(b, w) for w in (left, right) for b in (box, other)]
    merged, counts = merge(*pieces)
    assert boxes(merged) == [box, other] and counts["rejoined"] == 2
    top, bottom = Window(0, 0, 170, 50), Window(0, 50, 170, 100)
    assert boxes(merge(found(box, top), found((20, 30, 160, 60), bottom))[0]) == [(20, 30, 160, 60)]


def test_each_piece_has_one_partner_in_a_patch():
    """Two parallel objects whose boxes overlap more than half: the better partners are joined."""
    one, other = (20, 30, 160, 50), (20, 36, 160, 56)
    pieces = [found(b, w, mask=False) for w in (LEFT, RIGHT) for b in (one, other)]
    assert boxes(merge(*pieces)[0]) == [one, other]


def test_the_better_of_two_pieces_gets_the_only_partner():
    one, other = (20, 30, 160, 50), (40, 34, 160, 54)  # IoU of 16 / 24 in the strip
    pieces = [found(one, LEFT), found(other, LEFT), found(one, RIGHT)]
    for order in itertools.permutations(pieces):
        merged, counts = merge(*order)
        assert boxes(merged) == [one, (40, 34, 100, 54)] and counts["pieces"] == 2


def test_a_rejoined_part_that_is_still_cut_gives_way_to_the_whole():
    """Two patches beside each other cut it below as well; a third shows all of it."""
    upper = [Window(0, 0, 100, 100), Window(70, 0, 170, 100)]
    below = Window(35, 70, 135, 170)
    box = (60, 80, 120, 160)
    views = [found(box, w, score=s) for w, s in zip((*upper, below), (0.9, 0.9, 0.6), strict=True)]
    merged, counts = merge(*views, size=(170, 170))
    assert boxes(merged) == [box] and counts["rejoined"] == 1 and counts["duplicates"] == 1


# Duplicates.


@pytest.mark.parametrize("mask", [True, False])
def test_duplicates_of_two_patches_leave_the_better_one(mask):
    one = found((75, 30, 95, 50), LEFT, score=0.6, mask=mask)
    other = found((76, 30, 95, 50), RIGHT, score=0.8, mask=mask)
    merged, counts = merge(one, other)
    assert merged == [other._replace(cut=False)] and counts == {"duplicates": 1}
    assert len(merge(one, other, method="none")[0]) == 2
    assert len(merge(one, other, nms_iou=0.96)[0]) == 2  # IoU 19 / 20


def test_neighbours_within_a_patch_are_left_to_the_detector():
    one, other = found((10, 30, 40, 50), LEFT), found((11, 30, 40, 50), LEFT)
    assert len(merge(one, other)[0]) == 2


@pytest.mark.parametrize("mask", [True, False])
def test_a_cut_piece_gives_way_to_the_whole_object(mask):
    box = (60, 30, 98, 50)  # whole on the left but for the border's tolerance; cut on the right
    whole = found(box, LEFT, score=0.5, mask=mask)
    piece = found(box, RIGHT, score=0.9, mask=mask)
    merged, _ = merge(whole, piece, border=1)
    assert boxes(merged) == [box]
    # With a full weight, the better score decides, as in plain NMS.
    assert boxes(merge(whole, piece, border=1, cut_weight=1.0)[0]) == [piece.box]
    # A nested small object that nothing cuts is another object.
    nested = found((75, 35, 85, 45), RIGHT, mask=mask)
    assert len(merge(whole, nested, border=1)[0]) == 2


def test_soft_nms_decays_duplicates_but_drops_pieces():
    one = found((75, 30, 95, 50), LEFT, score=0.8)
    other = found((75, 30, 90, 50), RIGHT, score=0.6)  # IoU 3 / 4
    piece = found((80, 30, 140, 50), LEFT, score=0.3)
    whole = found((80, 30, 140, 50), RIGHT, score=0.7)
    merged, counts = merge(one, other, method="soft-nms")
    assert [d.score for d in merged] == [0.8, pytest.approx(0.15)]
    assert len(merge(one, other, method="soft-nms", min_score=0.2)[0]) == 1
    assert boxes(merge(piece, whole, method="soft-nms")[0]) == [whole.box]
    assert not counts


def test_limit_and_min_score_keep_the_best():
    views = [found((i * 9, 10, i * 9 + 5, 15), LEFT, score=i / 10) for i in range(1, 10)]
    merged, _ = merge(*views, limit=3)
    assert [d.score for d in merged] == [0.9, 0.8, 0.7]
    assert len(merge(*views, min_score=0.45)[0]) == 5
    assert merge() == ([], {})


def test_many_detections_equal_a_slow_loop():
    """Plain NMS over 150 boxes of three patches, against a double loop."""
    rng = np.random.default_rng(5)
    windows = [Window(0, 0, 200, 90), Window(100, 0, 300, 90), Window(150, 0, 400, 90)]
    views = []
    for _ in range(150):
        window = windows[rng.integers(3)]
        x, y = int(rng.integers(window.x1 + 6, window.x2 - 40)), int(rng.integers(6, 50))
        w, h = rng.integers(8, 30, 2)
        views.append(found((x, y, x + w, y + h), window, score=float(rng.random()),
                           category=int(rng.integers(2))))  # fmt: skip
    kept = []
    for view in sorted(views, key=lambda d: -d.score):
        for other in kept:
            ious = mask_util.iou(
                [to_rle(view.columns, 90, 400)], [to_rle(other.columns, 90, 400)], [0]
            )
            same = view.category_id == other.category_id and view.windows != other.windows
            if same and ious[0, 0] >= 0.3:
                break
        else:
            kept.append(view)
    merged, _ = merge(*views, size=(90, 400), nms_iou=0.3, border=0)
    assert boxes(merged) == boxes(kept) and len(kept) < 145


# Files.


@pytest.fixture
def small(tmp_path):
    """A patches' JSON as iSAID's kit writes it, that of its image, and results on the patches."""
    names = ["P1_0_100_0_100.png", "P1_0_100_70_170.png", "P2.png"]
    patches = {"images": [{"id": i, "file_name": n} for i, n in enumerate(names)]}
    whole = {
        "images": [
            {"id": 7, "file_name": "P1.png", "height": 100, "width": 170},
            {"id": 8, "file_name": "P2.png", "height": 60, "width": 50},
        ]
    }
    results = []
    for image_id, box in ((0, (20, 30, 100, 50)), (1, (0, 30, 90, 50)), (2, (3, 4, 13, 24))):
        size = (60, 50) if image_id == 2 else (100, 100)
        mask = np.zeros(size, np.uint8)
        mask[box[1] : box[3], box[0] : box[2]] = 1
        x1, y1, x2, y2 = box
        results.append({"image_id": image_id, "category_id": 4, "score": 0.5 + image_id / 10,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "segmentation": to_rle(from_dense(mask), *size)})  # fmt: skip
    files = {}
    for name, content in (("patches", patches), ("whole", whole), ("results", results)):
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps(content))
    return files


def run(small, *options):
    given = [small["results"], "--patches", small["patches"], "--workers", 0, *options]
    merge_patches.main([str(x) for x in given])


def test_patches_of_the_kit_tell_their_window_by_name(small, capsys):
    run(small, "--whole", small["whole"])
    merged = json.loads((small["results"].parent / "results_merged.json").read_text())
    assert [(r["image_id"], r["bbox"], r.get("pieces")) for r in merged] == [
        (7, [20, 30, 140, 20], 2),
        (8, [3, 4, 10, 20], None),
    ]
    assert merged[0]["segmentation"]["size"] == [100, 170]
    assert mask_util.area(merged[0]["segmentation"]) == 2800
    assert "2 pieces rejoined to 1 objects, 0 duplicates dropped" in capsys.readouterr().out


def test_results_of_boxes_alone_or_masks_alone(small):
    for key in ("segmentation", "bbox"):
        results = json.loads(small["results"].read_text())
        for result in results:
            del result[key]
        merged, _ = merge_results(
            results, read_patches(small["patches"], small["whole"]), MergeRules()
        )
        assert len(merged) == 2 and not any(key in result for result in merged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(image_id=99), "result 2 is on image 99, which is not in"),
        (lambda r: r.pop("score"), "entry 2 has no score"),
        (lambda r: r.update(bbox=[1, 2, 3]), "result 2 is malformed"),
        (lambda r: r.update(score=float("nan")), "result 2 is malformed.*not finite"),
        (lambda r: r["segmentation"].update(size=[9, 9]), r"mask of \[9, 9\] pixels"),
        (lambda r: r["segmentation"].update(counts="Q1"), "run lengths that add up to"),
    ],
)
def test_malformed_results_are_named(small, change, message):
    results = json.loads(small["results"].read_text())
    change(results[1])
    small["results"].write_text(json.dumps(results))
    with pytest.raises(SystemExit, match=message):
        run(small, "--whole", small["whole"])


def test_missing_and_truncated_files_are_named(small):
    with pytest.raises(
        SystemExit, match="P1_0_100_0_100.png is a patch is not known: give --whole"
    ):
        run(small)
    small["results"].write_text(small["results"].read_text()[:60])
    with pytest.raises(SystemExit, match="is not valid JSON"):
        run(small, "--whole", small["whole"])
    small["results"].unlink()
    with pytest.raises(SystemExit, match="is not there"):
        run(small, "--whole", small["whole"])
    with pytest.raises(SystemExit, match="join_iou must be in"):
        run(small, "--whole", small["whole"], "--join-iou", 0)


def test_ap_of_perfect_results_is_100_and_of_none_0(cut, tmp_path, capsys):
    _, path = cut("--masks", "rle", from_json=False)
    whole = path.parent / "whole_train.json"
    truth = json.loads(whole.read_text())["annotations"]
    perfect = [{**a, "score": 0.9} for a in truth]
    rows = [line.split("|") for line in evaluate(perfect, whole).splitlines()[2:]]
    assert [row[2].strip() for row in rows] == ["bbox", "segm"]
    assert all(float(row[3]) == 100 for row in rows)
    (row,) = (line.split("|") for line in evaluate([], whole).splitlines()[2:])
    assert float(row[3]) == 0

"""UAVDT's raw files to COCO's format: what is written, and what is said of files that are wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2")
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2det.data.uavdt import Options, convert
from d2det.data.uavdt_clips import Clip, choose_val
from d2det.data.uavdt_names import register_uavdt
from d2det.tools import convert_uavdt


@pytest.fixture
def run(raw_uavdt, tmp_path):
    """A function that converts and returns the contents by split, and the warnings."""

    def converted(*folders, output="out", workers=2, **options):
        warnings = []
        written = convert(
            folders or [raw_uavdt],
            tmp_path / output,
            Options(**options),
            workers=workers,
            warn=warnings.append,
        )
        return {split: json.loads(path.read_text()) for split, path in written.items()}, warnings

    return converted


def gt(raw, name, kind="whole"):
    return raw / "UAV-benchmark-MOTD_v1.0" / "GT" / f"{name}_gt_{kind}.txt"


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def test_splits_share_no_sequence(run):
    contents, warnings = run()
    names = {s: {i["sequence"] for i in c["images"]} for s, c in contents.items()}
    assert names["trainval"] == {"M0101", "M0201", "M0204"}
    assert names["test"] == {"M0203", "M0209"}
    assert names["train"] | names["val"] == names["trainval"]
    assert names["train"] and names["val"] and not names["train"] & names["val"]
    assert [w for w in warnings if "sequences are not there" in w and "comparable" in w]
    ids = [i["id"] for s in ("trainval", "test") for i in contents[s]["images"]]
    assert len(ids) == len(set(ids)) == 14
    assert contents["test"]["sequences"] == [
        {"name": "M0203", "attributes": ["night", "low altitude", "bird view"]},
        {
            "name": "M0209",
            "attributes": ["day", "low altitude", "front view", "side view", "long term"],
        },
    ]


def test_annotations_are_the_files_lines(run, raw_uavdt):
    contents, _ = run(three_classes=True)
    content = contents["test"]
    place = {image["id"]: image for image in content["images"]}
    for name in ("M0203", "M0209"):
        lines = [list(map(int, t.split(","))) for t in gt(raw_uavdt, name).read_text().split()]
        mine = [a for a in content["annotations"] if place[a["image_id"]]["sequence"] == name]
        found = [
            [place[a["image_id"]]["frame"], a["track"], *a["bbox"]]
            + [a[key] for key in ("out_of_view", "occlusion", "category_id")]
            for a in mine
        ]
        assert found == lines
    assert [c["name"] for c in content["categories"]] == ["car", "truck", "bus"]
    first = content["images"][0]
    assert (first["file_name"], first["width"], first["height"]) == ("M0203/img000001.jpg", 96, 64)
    assert len(content["ignore_regions"]) == 6  # M0209 has none
    assert [a["id"] for a in content["annotations"]] == list(range(1, 16))


def test_ignore_regions_are_painted_black(run, raw_uavdt, tmp_path):
    contents, warnings = run()
    assert contents["train"]["categories"] == [{"id": 1, "name": "vehicle"}]
    for name in ("M0101", "M0203"):
        source = pixels(raw_uavdt / "UAV-benchmark-M" / name / "img000002.jpg")
        target = pixels(tmp_path / "out" / "images" / name / "img000002.jpg")
        black = np.zeros((64, 96), bool)
        for line in gt(raw_uavdt, name, "ignore").read_text().split():
            frame, _, x, y, w, h, *_ = map(int, line.split(","))
            if frame == 2:
                black[max(y, 0) : y + h, max(x, 0) : x + w] = True
        assert target[black].mean() < 3
        # Beyond the blocks that a region touches, next to nothing changes.
        touched = np.kron(
            np.array([[black[r : r + 16, c : c + 16].any() for c in range(0, 96, 16)]
                      for r in range(0, 64, 16)]), np.ones((16, 16), bool)
        )  # fmt: skip
        assert not touched.all()
        assert np.abs(source - target)[~touched].mean() < 1
    # What lies wholly in a region is not trained on, but stays in the test set.
    assert len(contents["trainval"]["annotations"]) == 2 * 9
    assert len(contents["test"]["annotations"]) == 3 * 5
    assert any("trainval: 9 boxes that lie wholly in an ignore region" in w for w in warnings)
    # Frames without a region are not encoded again.
    for frame in ("img000001.jpg", "img000002.jpg"):
        source = raw_uavdt / "UAV-benchmark-M" / "M0209" / frame
        assert (tmp_path / "out/images/M0209" / frame).read_bytes() == source.read_bytes()


def test_ignore_regions_as_crowds_or_as_they_are(run, raw_uavdt, tmp_path):
    contents, _ = run(ignore_regions="crowd", three_classes=True)
    crowds = [a for a in contents["test"]["annotations"] if a["iscrowd"]]
    assert len(crowds) == 3 * 6 and {a["category_id"] for a in crowds} == {1, 2, 3}
    source = raw_uavdt / "UAV-benchmark-M" / "M0101" / "img000001.jpg"
    assert (tmp_path / "out/images/M0101/img000001.jpg").read_bytes() == source.read_bytes()
    contents, _ = run(ignore_regions="keep", output="kept")
    assert not any(a["iscrowd"] for a in contents["test"]["annotations"])
    assert len(contents["trainval"]["annotations"]) == 27
    assert len(contents["test"]["ignore_regions"]) == 6


def test_both_layouts_and_folders_apart(run, write_raw_uavdt, raw_uavdt, tmp_path):
    expected, _ = run()
    nested = write_raw_uavdt(tmp_path / "nested", "nested")
    found, _ = run(nested, output="nested_out")
    assert found == expected
    parts = [raw_uavdt / p for p in ("UAV-benchmark-M", "UAV-benchmark-MOTD_v1.0", "M_attr")]
    found, _ = run(*parts, output="parts_out")
    assert found == expected


def test_an_interrupted_conversion_goes_on(run, raw_uavdt, tmp_path):
    expected, _ = run()
    kept, lost = (tmp_path / "out/images/M0203" / f"img00000{n}.jpg" for n in (1, 2))
    before, content = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    (tmp_path / "out/annotations/instances_test.json").unlink()
    again, _ = run(workers=1)
    assert again == expected
    assert kept.stat().st_mtime_ns == before and lost.read_bytes() == content
    assert not list((tmp_path / "out").rglob("*.partial"))
    with pytest.raises(ValueError, match="out holds a conversion with other options"):
        run(ignore_regions="crowd")
    gt(raw_uavdt, "M0101", "ignore").write_text("1,1,2,2,5,5,1,-1,-1\n")
    with pytest.raises(ValueError, match="or of other files"):
        run()


@pytest.mark.parametrize("output", ["raw/out", "raw"])
def test_output_within_the_raw_folder(run, raw_uavdt, output):
    expected, _ = run()
    for _ in range(2):  # the second time, the converted images are there too
        found, _ = run(raw_uavdt, raw_uavdt / "UAV-benchmark-M", output=output)
        assert found == expected


def test_images_in_two_places(run, raw_uavdt, write_raw_uavdt):
    write_raw_uavdt(raw_uavdt / "again", "nested")
    with pytest.raises(ValueError, match="the images of M0101 are in two places"):
        run()


def test_images_on_another_disk_are_linked_by_name(run, raw_uavdt, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", refuse)
    run()
    target = tmp_path / "out/images/M0209/img000001.jpg"
    assert target.is_symlink() and target.resolve().parent.name == "M0209"


def edit(path, number, text):
    lines = path.read_text().splitlines()
    lines[number - 1] = text
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("kind", "number", "text", "message"),
    [
        ("whole", 4, "2,1,5,5,10,10,1,1", "M0101_gt_whole.txt:4: 8 columns, expected 9"),
        ("whole", 2, "1,1,5,5,ten,10,1,1,1", "M0101_gt_whole.txt:2: not all are numbers"),
        ("whole", 3, "1,1,5,5,nan,10,1,1,1", "M0101_gt_whole.txt:3: not all are finite"),
        ("whole", 5, "0,1,5,5,9,10,1,1,1", "M0101_gt_whole.txt:5: frame 0; frames are counted"),
        (
            "whole",
            6,
            "2,1,5,5,9,10,1,1,4",
            "M0101_gt_whole.txt:6: unknown class 4; known are 1 car",
        ),
        ("ignore", 2, "1,1,5,5", "M0101_gt_ignore.txt:2: 4 columns, expected at least 6"),
    ],
)
def test_malformed_lines_are_named(run, raw_uavdt, kind, number, text, message):
    edit(gt(raw_uavdt, "M0101", kind), number, text)
    with pytest.raises(ValueError, match=message):
        run()


def test_blank_lines_spaces_and_trailing_commas_are_read(run, raw_uavdt):
    expected, _ = run()
    for kind in ("whole", "ignore"):
        path = gt(raw_uavdt, "M0203", kind)
        lines = [line.replace(",", " , ") + "," for line in path.read_text().split()]
        path.write_bytes(("\ufeff" + "\r\n\r\n".join(lines)).encode())
    found, _ = run(output="again")
    assert found["test"] == expected["test"]


def test_missing_frames(run, raw_uavdt):
    (raw_uavdt / "UAV-benchmark-M/M0101/img000002.jpg").unlink()
    message = r"M0101_gt_whole.txt:4: frame 2 has no image in .*M0101 \(1 such frames, 3 boxes\)"
    with pytest.raises(FileNotFoundError, match=message):
        run()
    contents, warnings = run(allow_missing_frames=True)
    assert any("M0101_gt_whole.txt:4: frame 2 has no image" in w for w in warnings)
    frames = [i["frame"] for i in contents["trainval"]["images"] if i["sequence"] == "M0101"]
    assert frames == [1, 3]


def test_empty_sequences(run, raw_uavdt):
    gt(raw_uavdt, "M0201").write_text("")
    contents, warnings = run()
    assert any("M0201_gt_whole.txt is empty: its 4 frames" in w for w in warnings)
    assert sum(i["sequence"] == "M0201" for i in contents["trainval"]["images"]) == 4
    folder = raw_uavdt / "UAV-benchmark-M/M0204"
    for image in folder.iterdir():
        image.unlink()
    with pytest.raises(FileNotFoundError, match="M0204: an empty sequence, .* has 6 boxes"):
        run(output="other")
    gt(raw_uavdt, "M0204").write_text("")
    contents, warnings = run(output="third")
    assert any("M0204: an empty sequence, without any image: left out" in w for w in warnings)


def test_other_irregularities_are_told(run, raw_uavdt):
    gt(raw_uavdt, "M0101", "ignore").write_text("1,1,0,0,9,9,1\n1,2,8,8,9,9,1\n1,3,17,0,4,4,1\n")
    edit(gt(raw_uavdt, "M0201"), 2, "1,2,5,5,0,10,1,1,1")
    gt(raw_uavdt, "M0203", "ignore").unlink()
    (raw_uavdt / "M_attr/train/M0204_attr.txt").unlink()
    _, warnings = run()
    text = "\n".join(warnings)
    assert "M0101_gt_ignore.txt:2: overlaps the region of line 1 (1 such pairs)" in text
    assert "M0201_gt_whole.txt:2: 1 boxes without area left out" in text
    assert "M0203 has no M0203_gt_ignore.txt" in text
    assert "1 sequences have no attributes (M_attr): M0204" in text


def test_files_in_the_wrong_place(run, raw_uavdt, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        run(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no sequences of UAVDT"):
        run(raw_uavdt / "M_attr")
    with pytest.raises(FileNotFoundError, match="there is no M0101_gt_whole.txt"):
        run(raw_uavdt / "UAV-benchmark-M")
    moved = raw_uavdt / "M_attr/test/M0101_attr.txt"
    (raw_uavdt / "M_attr/train/M0101_attr.txt").rename(moved)
    with pytest.raises(ValueError, match="M0101 is a sequence of the train split"):
        run()
    moved.rename(raw_uavdt / "M_attr/train/M0101_attr.txt")
    (raw_uavdt / "UAV-benchmark-M/M0101").rename(raw_uavdt / "UAV-benchmark-M/M9901")
    gt(raw_uavdt, "M0101").rename(gt(raw_uavdt, "M9901"))
    with pytest.raises(ValueError, match="M9901 is not in UAVDT's lists"):
        run()


def test_unreadable_files_are_named(run, raw_uavdt):
    (raw_uavdt / "M_attr/train/M0101_attr.txt").write_text("1,0,2\n")
    with pytest.raises(ValueError, match="M0101_attr.txt:1: expected 10 values of 0 or 1"):
        run()
    (raw_uavdt / "M_attr/train/M0101_attr.txt").unlink()
    (raw_uavdt / "UAV-benchmark-M/M0201/img000003.jpg").write_bytes(b"\xff\xd8 cut")
    with pytest.raises(ValueError, match="M0201/img000003.jpg cannot be converted"):
        run()


def test_validation_has_every_condition_that_training_can_spare():
    def clip(name, frames, *attributes, is_test=False):
        frames = {i: Path() for i in range(frames)}
        return Clip(name, is_test, frames, [], [], list(attributes))

    clips = [
        clip("M0101", 50, "day", "front view"),
        clip("M0201", 40, "day", "bird view"),
        clip("M0202", 30, "night"),
        clip("M0204", 20, "night", "fog"),  # the only fog: stays in training, but for the night
        clip("M0206", 200, "day", "front view"),
        clip("M0203", 1, "day", is_test=True),
    ]
    assert choose_val(clips) == ("M0101", "M0201", "M0204")
    assert choose_val(clips[::-1]) == choose_val(clips)
    plain = [clip(f"M{i}", 10) for i in range(1001, 1041)]
    assert choose_val(plain) == ("M1001", "M1002", "M1003", "M1004")
    assert choose_val(plain[:1]) == ()


def test_chosen_validation_sequences(run):
    contents, _ = run(val_sequences=("M0101",))
    assert {i["sequence"] for i in contents["val"]["images"]} == {"M0101"}
    with pytest.raises(ValueError, match="M0203: no training sequences"):
        run(val_sequences=("M0203",), output="other")


def test_the_command(raw_uavdt, tmp_path, capsys):
    convert_uavdt.main([str(raw_uavdt), str(tmp_path / "out"), "--workers", "2"])
    printed = capsys.readouterr()
    assert "instances_trainval.json" in printed.out and "warning: 27 of the 30" in printed.err
    edit(gt(raw_uavdt, "M0101"), 1, "oops")
    with pytest.raises(SystemExit, match=r"error: .*M0101_gt_whole.txt:1: 1 columns"):
        convert_uavdt.main([str(raw_uavdt), str(tmp_path / "out")])


def test_data_sets_by_name(run, tmp_path):
    run()
    try:
        register_uavdt(tmp_path / "out")
        assert MetadataCatalog.get("uavdt_test").evaluator_type == "uavdt"
        records = DatasetCatalog.get("uavdt_test")
        assert len(records) == 5 and all(Path(r["file_name"]).is_file() for r in records)
        assert MetadataCatalog.get("uavdt_test").thing_classes == ["vehicle"]
        assert sum(len(r["annotations"]) for r in DatasetCatalog.get("uavdt_trainval")) == 18
    finally:
        register_uavdt()

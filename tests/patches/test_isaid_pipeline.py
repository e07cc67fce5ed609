"""iSAID's raw form through cutting, training, evaluation and merging."""

from __future__ import annotations

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2det.data import isaid
from d2det.data.checks import check_datasets
from d2det.data.named import register_named
from d2det.engine.arguments import argument_parser
from d2det.engine.main import main
from d2det.engine.setup import get_cfg
from d2det.tools import merge_patches

TINY = [
    "MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", "15",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "MODEL.ROI_HEADS.PRE_REGRESSION_TOPK", "20",
    "MODEL.RPN.POST_NMS_TOPK_TEST", "30", "TEST.DETECTIONS_PER_IMAGE", "20",
    "TEST.NUM_PICTURES", "1", "TEST.COCO.MAX_DETS", "1000",
    "TEST.COCO.AREA_RANGES", "[['s',16,400],['m',400,2500],['l',2500,1e10]]",
    "INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MAX_SIZE_TRAIN", "128",
    "INPUT.MIN_SIZE_TEST", "96", "INPUT.MAX_SIZE_TEST", "128",
    "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "()",
    "SOLVER.CHECKPOINT_PERIOD", "3", "DATASETS.TRAIN", "('isaid_train',)",
    "DATASETS.TEST", "('isaid_val',)",
]  # fmt: skip


@pytest.fixture
def datasets(cut, tmp_path):
    """The patches of both splits where the named data sets look for them."""
    for split in ("train", "val"):
        cut(split=split)
    root = tmp_path / "root"
    root.mkdir()
    (root / "isaid").symlink_to(tmp_path, target_is_directory=True)
    register_named(root)
    yield root
    register_named()


def test_names_and_ids_are_registered(datasets):
    records = DatasetCatalog.get("isaid_train")
    assert MetadataCatalog.get("isaid_train").thing_classes == list(isaid.CLASSES)
    found = {a["category_id"] for r in records for a in r["annotations"]}
    assert {isaid.CLASSES[i] for i in found} == {"Small_Vehicle", "plane", "Harbor", "ship"}
    cfg = get_cfg("iSAID/d2det_R_101_FPN")
    check_datasets(cfg)
    assert cfg.TEST.DETECTIONS_PER_IMAGE == cfg.TEST.COCO.MAX_DETS == 1000
    assert [area[1] for area in cfg.TEST.COCO.AREA_RANGES] == [10**2, 144**2, 512**2]


def test_a_json_of_the_kit_is_refused_with_the_way_out(datasets):
    path, _ = isaid.split_paths(datasets / "isaid", "val")
    content = json.loads(path.read_text())
    content["annotations"][0]["id"] = 0
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="an annotation of id 0: cut the images by"):
        DatasetCatalog.get("isaid_val")
    content["categories"][0]["name"], content["categories"][1]["name"] = "storage tank", "Ship"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="another id for storage tank than iSAID's"):
        DatasetCatalog.get("isaid_val")
    content["categories"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has 14 categories; isaid_val has the ids 1 to 15"):
        DatasetCatalog.get("isaid_val")


@pytest.mark.slow
def test_from_raw_data_to_results_on_whole_images(datasets, tmp_path, capsys):
    output = tmp_path / "output"
    args = ["--config-file", "shapes/d2det_masks", *TINY, "OUTPUT_DIR", str(output)]
    results = main(argument_parser().parse_args(args))
    assert {"APs", "APm", "APl"} <= set(results["segm"])
    assert all(np.isfinite(results["segm"][k]) for k in ("AP", "APs"))
    for name in ("coco_instances_results.json", "coco_segm_results.json"):
        found = output / "inference" / "isaid_val" / name
        patches, _ = isaid.split_paths(datasets / "isaid", "val")
        whole = patches.parent / "whole_val.json"
        given = [found, "--patches", patches, "--evaluate", whole, "--workers", 0]
        capsys.readouterr()
        merge_patches.main([str(x) for x in given])
        out = capsys.readouterr().out
        assert ("| segm" if "segm" in name else "| bbox") in out
        before = json.loads(found.read_text())
        merged = json.loads(found.with_name(f"{found.stem}_merged.json").read_text())
        assert 0 < len(merged) < len(before)
        sizes = {
            i["id"]: [i["height"], i["width"]] for i in json.loads(whole.read_text())["images"]
        }
        for result in merged:
            assert result["image_id"] in sizes and 1 <= result["category_id"] <= 15
            if "segmentation" in result:
                assert result["segmentation"]["size"] == sizes[result["image_id"]]

"""The experiments that come with the project: their configs exist and take their arguments."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("detectron2")

from d2det.engine.configs import config_names
from d2det.tools.experiments.experiment import load_experiment
from d2det.tools.experiments.folders import settings_of

FILES = sorted((Path(__file__).parents[4] / "experiments").glob("*.yaml"))
# Experiments whose configs come with other parts of the project.
WAITING = {
    "coco_masks": "COCO-InstanceSegmentation/d2det_R_50_FPN_2x",
    "isaid": "iSAID/d2det_R_101_FPN",
    "shapes_deformable": "shapes/deformable/regular",
    "shapes_masks": "shapes/d2det_masks",
    "uavdt": "UAVDT/d2det_R_101_FPN",
}


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_configs_exist_and_take_the_arguments(file):
    if file.stem in WAITING and WAITING[file.stem] not in config_names():
        pytest.skip(f"{WAITING[file.stem]} is not there yet")
    experiment = load_experiment(file)
    assert experiment.title and len(experiment.title) < 60
    for method in experiment.methods:
        settings_of(method, experiment.train_args)
    for tasks in (method.published for method in experiment.methods):
        assert all(0 < value < 100 for metrics in tasks.values() for value in metrics.values())

"""The experiments that come with the project: their configs exist and take their arguments."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("detectron2")

from d2det.tools.experiments.experiment import load_experiment
from d2det.tools.experiments.folders import settings_of

FILES = sorted((Path(__file__).parents[4] / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_configs_exist_and_take_the_arguments(file):
    experiment = load_experiment(file)
    assert experiment.title and len(experiment.title) < 60
    for method in experiment.methods:
        settings_of(method, experiment.train_args)
    for tasks in (method.published for method in experiment.methods):
        assert all(0 < value < 100 for metrics in tasks.values() for value in metrics.values())

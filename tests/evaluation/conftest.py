"""COCO-format ground truth under a name of its own."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def register(tmp_path):
    """A function that registers COCO content; classes are its categories, in their order."""
    data = pytest.importorskip("detectron2.data")
    names = []

    def add(content, **metadata):
        name = f"evaluator_{len(names)}"
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(content))
        data.DatasetCatalog.register(name, lambda: [])
        categories = content.get("categories", [])
        if categories:
            metadata["thing_classes"] = [category["name"] for category in categories]
            metadata["thing_dataset_id_to_contiguous_id"] = {
                category["id"]: index for index, category in enumerate(categories)
            }
        data.MetadataCatalog.get(name).set(json_file=str(file), **metadata)
        names.append(name)
        return name

    yield add
    for name in names:
        data.DatasetCatalog.remove(name)
        data.MetadataCatalog.remove(name)

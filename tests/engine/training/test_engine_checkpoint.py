from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2")

from detectron2.checkpoint import DetectionCheckpointer

from d2det.engine.checkpoint import Checkpointer, atomic_write


class Model(nn.Module):
    def __init__(self, classes: int = 3, mask: bool = False) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.score = nn.Linear(5, classes + 1)
        if mask:
            self.mask = nn.Linear(5, 2)


class Counter:
    """Stands for a trainer."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> dict:
        return {"value": self.value}

    def load_state_dict(self, state: dict) -> None:
        self.value = state["value"]


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_round_trip_and_detectron2_reads_it(tmp_path):
    model = Model()
    Checkpointer(model, str(tmp_path), trainer=Counter(7)).save("model_0000001", iteration=1)
    assert names(tmp_path) == ["last_checkpoint", "model_0000001.pth"]

    for make in (Checkpointer, DetectionCheckpointer):
        other, counter = Model(), Counter()
        rest = make(other, str(tmp_path), trainer=counter).resume_or_load("", resume=True)
        assert same(model, other) and counter.value == 7 and rest["iteration"] == 1


@pytest.mark.parametrize("moment", ["writing", "replacing", "tagging"])
def test_a_crash_while_saving_leaves_the_previous_checkpoint(tmp_path, monkeypatch, moment):
    model = Model()
    checkpointer = Checkpointer(model, str(tmp_path), trainer=Counter(1))
    checkpointer.save("model")
    before = [p.clone() for p in model.parameters()]
    nn.init.ones_(model.body.weight)

    def write_half(data, file):
        file.write(b"half a file")
        raise RuntimeError("disk full")

    replaced = []

    def crash(source, target, replace=os.replace):
        replaced.append(target)
        if moment == "replacing" or len(replaced) == 2:
            raise OSError("disk full")
        replace(source, target)

    if moment == "writing":
        monkeypatch.setattr(torch, "save", write_half)
    else:
        monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match=r"model2?\.pth cannot be written: disk full.*intact"):
        checkpointer.save("model" if moment != "tagging" else "model2")
    monkeypatch.undo()

    assert [n for n in names(tmp_path) if n.endswith(".tmp")] == []
    other = Model()
    Checkpointer(other, str(tmp_path), trainer=Counter()).resume_or_load("", resume="must")
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_atomic_write_ends_at_any_moment_with_a_whole_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with atomic_write(str(path), "w") as file:
            file.write("ne")
            assert path.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]
    with atomic_write(str(path), "w") as file:
        file.write("new")
    assert path.read_text() == "new" and names(tmp_path) == ["file"]


def test_another_class_count_loads_all_that_fits_and_lists_the_rest(tmp_path, engine_log):
    old, new = Model(classes=3, mask=True), Model(classes=5)
    Checkpointer(old, str(tmp_path)).save("old")
    score = new.score.weight.clone()
    Checkpointer(new).load(str(tmp_path / "old.pth"))
    assert torch.equal(new.body.weight, old.body.weight) and torch.equal(new.score.weight, score)
    for line in (
        "old.pth: 2 of 4 tensors loaded.",
        "score.weight: (4, 5) in the file, (6, 5) in the model",
        "score.bias: (4,) in the file, (6,) in the model",
        "In the file, but not in the model:\n  mask: bias, weight",
        "starts from its initial values",
    ):
        assert line in engine_log.text
    assert "Not in the file" not in engine_log.text

    engine_log.clear()
    Checkpointer(Model(classes=3), "").load(str(tmp_path / "old.pth"))
    Checkpointer(Model(classes=3, mask=True), "").load(str(tmp_path / "old.pth"))
    assert "6 of 6 tensors loaded." in engine_log.text


@pytest.mark.parametrize("heuristics", [True, False])
def test_detectron2_pkl_files(tmp_path, heuristics, engine_log):
    old = Model(classes=80)
    data = {"model": {k: v.numpy() for k, v in old.state_dict().items()}, "__author__": "someone"}
    data |= {"matching_heuristics": True} if heuristics else {}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(data))
    new = Model(classes=2)
    Checkpointer(new).load(str(tmp_path / "zoo.pkl"))
    assert torch.equal(new.body.weight, old.body.weight)
    assert "score.weight: (81, 5) in the file, (3, 5) in the model" in engine_log.text


def test_other_wrappings_of_a_state_dict(tmp_path):
    old = Model()
    for number, content in enumerate((old.state_dict(), {"state_dict": old.state_dict()})):
        torch.save(content, tmp_path / f"{number}.pth")
        new = Model()
        Checkpointer(new).load(str(tmp_path / f"{number}.pth"))
        assert same(old, new)


def test_nothing_fits(tmp_path):
    torch.save({"encoder.layer.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"None of the 1 tensors.*encoder.layer.weight.*body"):
        Checkpointer(Model()).load(str(tmp_path / "other.pth"))


def test_missing_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'none\.pth' does not exist\. Give the path"):
        Checkpointer(Model(), str(tmp_path)).resume_or_load("none.pth", resume="no")
    assert Checkpointer(Model(), str(tmp_path)).resume_or_load("", resume="no") == {}


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_damaged_checkpoint_names_itself_and_the_others(tmp_path, damage):
    checkpointer = Checkpointer(Model(), str(tmp_path), trainer=Counter())
    checkpointer.save("model_0000001")
    checkpointer.save("model_0000003")
    last = tmp_path / "model_0000003.pth"
    content = last.read_bytes()
    last.write_bytes({"truncated": content[:-200], "garbage": b"x" * 500, "empty": b""}[damage])
    with pytest.raises(RuntimeError) as caught:
        checkpointer.resume_or_load("", resume="auto")
    message = str(caught.value)
    assert str(last) in message and "damaged" in message
    assert "last_checkpoint; there are: model_0000001.pth." in message

    # What the message advises works, with the same object.
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    checkpointer.resume_or_load("", resume="must")
    assert checkpointer.resumed


def test_files_that_could_run_code_are_not_loaded(tmp_path):
    torch.save({"model": {}, "config": Path("x")}, tmp_path / "odd.pth")
    with pytest.raises(RuntimeError, match="could run code when read"):
        Checkpointer(Model()).load(str(tmp_path / "odd.pth"))


def test_choices_of_resume(tmp_path, engine_log):
    model, other = Model(), Model()
    Checkpointer(other, str(tmp_path / "weights")).save("w")
    weights = str(tmp_path / "weights" / "w.pth")
    checkpointer = Checkpointer(model, str(tmp_path / "out"), trainer=Counter())
    with pytest.raises(FileNotFoundError, match=r"--resume: there is no last_checkpoint.*auto"):
        checkpointer.resume_or_load(weights, resume="must")
    for start in ("auto", "no", True, False):
        checkpointer.resume_or_load(weights, resume=start)
        assert not checkpointer.resumed and same(model, other)
    assert "already holds checkpoints" not in engine_log.text

    nn.init.zeros_(model.body.weight)
    checkpointer.save("model_0000009")
    checkpointer.resume_or_load(weights, resume="no")
    assert not checkpointer.resumed and same(model, other)
    assert "already holds checkpoints (model_0000009.pth)" in engine_log.text
    checkpointer.resume_or_load(weights, resume="auto")
    assert checkpointer.resumed and not model.body.weight.any()
    with pytest.raises(ValueError, match="resume must be one of"):
        checkpointer.resume_or_load(weights, resume="yes")
    os.remove(tmp_path / "out" / "model_0000009.pth")
    with pytest.raises(FileNotFoundError, match=r"model_0000009\.pth' does not exist"):
        checkpointer.resume_or_load(weights, resume="auto")


def test_resuming_is_strict(tmp_path):
    Checkpointer(Model(3), str(tmp_path), trainer=Counter()).save("model")
    with pytest.raises(ValueError, match=r"score\.weight: \(4, 5\) in the file, \(3, 5\) in the m"):
        Checkpointer(Model(2), str(tmp_path), trainer=Counter()).resume_or_load("", resume="must")
    with pytest.raises(ValueError, match=r"Not in the file:\n  mask: bias, weight"):
        Checkpointer(Model(3, mask=True), str(tmp_path), trainer=Counter()).resume_or_load("")

    Checkpointer(Model(3), str(tmp_path)).save("weights_only")
    with pytest.raises(ValueError, match="holds no state of trainer.*MODEL.WEIGHTS"):
        Checkpointer(Model(3), str(tmp_path), trainer=Counter()).resume_or_load("", resume="must")


def test_addresses_that_cannot_be_fetched():
    with pytest.raises(RuntimeError, match="cannot be fetched.*give its path as MODEL.WEIGHTS"):
        Checkpointer(Model()).load("catalog://nowhere/x.pkl")

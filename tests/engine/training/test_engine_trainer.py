from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from d2det.engine.checkpoint import Checkpointer
from d2det.engine.hooks import BestCheckpoint
from d2det.engine.resume import get_rng_state, keep_earlier, set_rng_state, trim_metrics


@pytest.fixture
def train(tiny, tmp_path):
    """Trains and returns the trainer; the same name is the same folder."""

    def call(name: str, *, resume: str = "no", cls: type | None = None, **keys):
        tiny.register_dataset(tmp_path / "data")
        cfg = tiny.tiny_cfg(tmp_path / name, **keys)
        tiny.seed_model(cfg.SEED)
        trainer = (cls or tiny.TinyTrainer)(cfg)
        trainer.resume_or_load(resume)
        trainer.train()
        return trainer

    return call


def assert_same(a, b) -> None:
    """Weights, BatchNorm statistics and momenta are equal to the last bit."""
    first, second = a.model.state_dict(), b.model.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    momenta = [t.optimizer.state_dict()["state"] for t in (a, b)]
    assert momenta[0].keys() == momenta[1].keys() and momenta[0]
    for key, state in momenta[0].items():
        assert torch.equal(state["momentum_buffer"], momenta[1][key]["momentum_buffer"])


class Interrupted(Exception):
    """What ends a training in these tests."""


def stopping(tiny, iteration: int) -> type:
    class Stopping(tiny.TinyTrainer):
        def run_step(self) -> None:
            if self.iter == iteration:
                raise Interrupted
            super().run_step()

    return Stopping


def test_a_training_learns_and_reports(train, tmp_path, tiny):
    trainer = train("run", SOLVER__MAX_ITER=40, SOLVER__CHECKPOINT_PERIOD=30)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").open()]
    assert {"total_loss", "loss_cls", "loss_rpn_cls", "lr", "data_time"} <= set(lines[0])
    assert lines[-1]["bbox/images"] == 12
    history = trainer.storage.history("total_loss").values()
    losses = [value for value, _ in history]
    assert len(losses) == 40 and np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    assert trainer.last_eval_results["bbox"]["images"] == 12
    names = {p.name for p in (tmp_path / "run").glob("*.pth")}
    assert names == {"model_0000029.pth", "model_final.pth"}
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_final.pth"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_equals_uninterrupted(train, tiny, accumulate, tmp_path, engine_log):
    keys = {"SOLVER__ACCUMULATE": accumulate, "TEST__EVAL_PERIOD": 2}
    whole = train("whole", **keys)
    with pytest.raises(Interrupted):
        train("cut", cls=stopping(tiny, 5), **keys)
    random.seed(99), tiny.seed_model(99)
    resumed = train("cut", resume="must", SEED=77, **keys)
    assert resumed.start_iter == 4
    assert_same(whole, resumed)
    assert "goes on with the checkpoint's seed 3" in engine_log.text

    final = [torch.load(tmp_path / n / "model_final.pth") for n in ("whole", "cut")]
    states = [f["trainer"] for f in final]
    assert states[0]["data"] == states[1]["data"] and states[0]["iteration"] == 5
    assert states[0]["data"]["batches"] == 6 * accumulate
    assert states[0]["hooks"] == states[1]["hooks"]
    draws = []
    for (rng,) in (state["rng"] for state in states):
        set_rng_state(rng)
        draws.append([random.random(), np.random.rand(), torch.rand(1).item()])
    assert draws[0] == draws[1]


def test_the_comparison_above_can_fail(train):
    with pytest.raises(AssertionError):
        assert_same(train("a"), train("b", SEED=4))


def test_evaluation_does_not_touch_the_training(train):
    often, never = train("often", TEST__EVAL_PERIOD=1), train("never", TEST__EVAL_PERIOD=0)
    assert_same(often, never)
    assert len(often.storage.history("bbox/AP").values()) == 6
    assert len(never.storage.history("bbox/AP").values()) == 1


def test_precise_batch_norm_changes_statistics_alone(train):
    keys = {"TEST__PRECISE_BN__ENABLED": True, "TEST__PRECISE_BN__NUM_ITER": 2}
    plain, once, again = train("plain"), train("once", **keys), train("again", **keys)
    parameters = [dict(t.model.named_parameters()) for t in (plain, once)]
    assert all(torch.equal(parameters[0][k], parameters[1][k]) for k in parameters[0])
    mean = "backbone.bottom_up.stem.conv1.norm.running_mean"
    assert not torch.equal(plain.model.state_dict()[mean], once.model.state_dict()[mean])
    assert_same(once, again)


def test_bfloat16_trains_and_evaluates(train):
    full = train("full")
    half = train("half", SOLVER__AMP__ENABLED=True)
    assert half.model.training and half.last_eval_results["bbox"]["AP"] > 0
    close = [s.storage.history("total_loss").values()[0][0] for s in (full, half)]
    assert close[0] != close[1] and close[0] == pytest.approx(close[1], rel=0.05)
    with pytest.raises(ValueError, match="needs a GPU"):
        train("fp16", SOLVER__AMP__ENABLED=True, SOLVER__AMP__PRECISION="fp16")


def test_clipping_of_all_gradients_together(train):
    keys = {"SOLVER__MAX_ITER": 1, "SOLVER__WARMUP_ITERS": 0, "SOLVER__WEIGHT_DECAY": 0.0}
    clip = {
        "SOLVER__CLIP_GRADIENTS__ENABLED": True,
        "SOLVER__CLIP_GRADIENTS__CLIP_TYPE": "full_model",
        "SOLVER__CLIP_GRADIENTS__CLIP_VALUE": 0.125,
    }

    def norm(trainer) -> float:
        states = trainer.optimizer.state_dict()["state"].values()  # after 1 step: the gradients
        return sum(float(s["momentum_buffer"].square().sum()) for s in states) ** 0.5

    assert norm(train("free", **keys)) > 0.25
    assert norm(train("clipped", **keys, **clip)) == pytest.approx(0.125, rel=1e-4)


def scripted(tiny, values: dict[int, float], stop: int = -1) -> type:
    """A trainer whose AP after n iterations is values[n]."""

    class Scripted(stopping(tiny, stop)):
        def test(self, cfg, model, evaluators=None):  # a classmethod in earnest
            return {"bbox": {"AP": values[min(self.iter + 1, self.max_iter)]}}

    return Scripted


def test_the_best_checkpoint_survives_a_restart(train, tiny, tmp_path):
    values = {2: 0.5, 4: 0.9, 6: 0.6}
    keys = {"TEST__EVAL_PERIOD": 2, "SOLVER__BEST_CHECKPOINT": "bbox/AP"}
    best = tmp_path / "run" / "model_best.pth"
    with pytest.raises(Interrupted):
        train("run", cls=scripted(tiny, values, stop=4), **keys)
    at_four = torch.load(best)
    assert at_four["metric"] == {"bbox/AP": 0.9} and "trainer" not in at_four
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_0000003.pth"

    train("run", cls=scripted(tiny, values), resume="must", **keys)
    at_six = torch.load(best)
    assert at_six["iteration"] == 3 and at_six["metric"] == {"bbox/AP": 0.9}

    train("run", cls=scripted(tiny, values | {8: 0.95}), resume="must", SOLVER__MAX_ITER=8, **keys)
    assert torch.load(best)["iteration"] == 7


def test_an_evaluation_that_was_killed_is_made_up_for(train, tiny, tmp_path):
    values = {2: 0.5, 4: 0.9, 6: 0.6}
    keys = {"TEST__EVAL_PERIOD": 4, "SOLVER__BEST_CHECKPOINT": "bbox/AP"}

    class Killed(tiny.TinyTrainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            raise Interrupted

    with pytest.raises(Interrupted):
        train("run", cls=Killed, **keys)
    assert not (tmp_path / "run" / "model_best.pth").exists()
    asked = []

    class Asked(scripted(tiny, values)):
        def test(self, cfg, model, evaluators=None):
            asked.append(self.iter)
            return {"bbox": {"AP": 0.9 if len(asked) == 1 else 0.6}}

    train("run", cls=Asked, resume="must", **keys)
    assert asked == [4, 5]  # before iteration 4 runs, and after the last
    assert torch.load(tmp_path / "run" / "model_best.pth")["iteration"] == 3


def test_resuming_a_finished_training_evaluates_only(train):
    first = train("run")
    again = train("run", resume="auto")
    assert again.start_iter == 6
    assert again.last_eval_results == first.last_eval_results
    assert_same(first, again)


def test_a_failing_last_iteration_is_not_evaluated(train, tiny):
    evaluated = []

    class Failing(stopping(tiny, 5)):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            evaluated.append(1)
            return {}

    with pytest.raises(Interrupted):
        train("run", cls=Failing)
    assert not evaluated


def test_metrics_are_not_written_twice(train, tiny, tmp_path):
    with pytest.raises(Interrupted):
        train("run", cls=stopping(tiny, 25), SOLVER__MAX_ITER=30, SOLVER__CHECKPOINT_PERIOD=15)
    train("run", resume="must", SOLVER__MAX_ITER=30)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").open()]
    iterations = [line["iteration"] for line in lines]
    assert len(set(iterations)) == len(iterations) and iterations[-1] == 29


def test_trim_metrics(tmp_path):
    path = tmp_path / "metrics.json"
    trim_metrics(str(path), 3)
    assert not path.exists()
    path.write_text('{"iteration": 2}\n{"iteration": 3}\n{"iteration": 1}\n{"iterat')
    with path.open("a") as writer:
        trim_metrics(str(path), 3)
        writer.write('{"iteration": 4}\n')
    assert path.read_text() == '{"iteration": 2}\n{"iteration": 1}\n{"iteration": 4}\n'


def test_an_earlier_training_is_set_aside_not_lost(tmp_path):
    keep_earlier(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model_best.pth").write_text("weights")
    with (tmp_path / "metrics.json").open("a") as writer:
        writer.write('{"iteration": 2}\n')
        writer.flush()
        keep_earlier(str(tmp_path))
        trim_metrics(str(tmp_path / "metrics.json"), 0)
        writer.write('{"iteration": 0}\n')
    assert not (tmp_path / "model_best.pth").exists()
    assert (tmp_path / "earlier_model_best.pth").read_text() == "weights"
    assert (tmp_path / "earlier_metrics.json").read_text() == '{"iteration": 2}\n'
    assert (tmp_path / "metrics.json").read_text() == '{"iteration": 0}\n'


def test_generator_states_survive_a_file(tmp_path):
    def draw() -> list[float]:
        return [random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item()]

    np.random.randn()  # leaves a second normal number behind, which is part of the state
    torch.save(get_rng_state(), tmp_path / "rng.pth")
    first = draw()
    draw()
    set_rng_state(torch.load(tmp_path / "rng.pth"))
    assert draw() == first


def test_which_metric_decides_and_what_is_written(engine_log, tmp_path):
    best = BestCheckpoint(Checkpointer(torch.nn.Linear(2, 2), str(tmp_path)), "bbox/AP", ("1", "2"))
    best.update({"2/bbox/AP": 3.0, "1/bbox/AP": 1.0}, 0)
    best.update({"1/bbox/AP": float("nan")}, 1)
    saved = torch.load(tmp_path / "model_best.pth")
    assert saved["metric"] == {"bbox/AP": 1.0} and saved["iteration"] == best.iteration == 0
    assert not (tmp_path / "last_checkpoint").exists()  # nothing to resume from
    best.update({"segm/AP": 1.0}, 2)
    assert "'bbox/AP' is not among the results" in engine_log.text and "segm/AP" in engine_log.text


def test_several_test_sets_and_none(tiny, tmp_path):
    tiny.register_dataset(tmp_path / "a", "tiny_a"), tiny.register_dataset(tmp_path / "b", "tiny_b")
    cfg = tiny.tiny_cfg(tmp_path / "out", "tiny_a", DATASETS__TEST=("tiny_a", "tiny_b"))
    model = tiny.TinyTrainer.build_model(cfg)
    model.train()
    results = tiny.TinyTrainer.test(cfg, model)
    assert set(results) == {"tiny_a", "tiny_b"} and results["tiny_b"]["bbox"]["images"] == 12
    assert model.training
    cfg.DATASETS.TEST = ()
    assert tiny.TinyTrainer.test(cfg, model) == {}

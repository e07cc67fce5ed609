from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2")

from detectron2.utils.events import EventStorage

from d2det.engine.amp import amp_dtype
from d2det.engine.step import StepTrainer, distribute


class Toy(nn.Module):
    """Mean squared error of a line; no norm layer and no sampling, so that batches can be split."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(3, 1)

    def forward(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        x, y = (torch.stack([d[k] for d in batch]) for k in ("x", "y"))
        error = self.line(x)[:, 0].float() - y
        return {"loss_square": (error**2).mean(), "loss_abs": error.abs().mean()}


def samples(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "file_name": f"{i}.jpg",
            "x": torch.randn(3, generator=generator),
            "y": torch.randn((), generator=generator),
        }
        for i in range(count)
    ]


def batches(data: list[dict], size: int) -> list[list[dict]]:
    return [data[i : i + size] for i in range(0, len(data), size)]


def run(data: list[list[dict]], iterations: int = 3, model: nn.Module | None = None, **keys):
    model = Toy() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = StepTrainer(model, itertools.cycle(data), optimizer, **keys)
    with EventStorage() as trainer.storage:
        for trainer.iter in range(iterations):
            trainer.storage.iter = trainer.iter
            trainer.run_step()
    return model, trainer


def test_accumulation_equals_the_large_batch():
    data = samples(24)
    large, t1 = run(batches(data, 8))
    small, t2 = run(batches(data, 2), accumulate=4)
    torch.testing.assert_close(small.line.weight, large.line.weight)
    for name in ("loss_square", "loss_abs", "total_loss"):
        first, second = (t.storage.history(name).values() for t in (t1, t2))
        assert [i for _, i in second] == [0, 1, 2]
        assert [v for v, _ in second] == pytest.approx([v for v, _ in first], rel=1e-5)
    other, _ = run(batches(data, 2), accumulate=3)
    assert not torch.allclose(other.line.weight, large.line.weight)


def test_a_step_worked_by_hand():
    model = Toy()
    nn.init.zeros_(model.line.weight), nn.init.zeros_(model.line.bias)
    data = [[{"x": torch.tensor([1.0, 0, 0]), "y": torch.tensor(2.0)}]]
    # d/dw (w - 2)^2 + |w - 2| = -4 - 1 at 0, for weight and bias alike; times the rate 0.1.
    run(data, 1, model)
    torch.testing.assert_close(model.line.weight, torch.tensor([[0.5, 0, 0]]))
    torch.testing.assert_close(model.line.bias, torch.tensor([0.5]))

    nn.init.zeros_(model.line.weight), nn.init.zeros_(model.line.bias)
    run(data, 1, model, max_grad_norm=1.0)  # (-5, -5) becomes (-1, -1) / sqrt(2)
    torch.testing.assert_close(model.line.bias, torch.tensor([0.1 / 2**0.5]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(bad):
    data = batches(samples(12), 2)
    data[5][1]["y"] = torch.tensor(bad)
    model = Toy()
    after_two, _ = run(data, 2, accumulate=2)
    with pytest.raises(FloatingPointError) as caught:
        run(data, 3, model, accumulate=2)
    message = str(caught.value)
    assert f"loss_square = {bad}" in message and "loss_abs" in message
    assert "iteration 2, process 0" in message
    assert "10.jpg, 11.jpg" in message and "8.jpg" not in message
    assert "SOLVER.BASE_LR" in message and "CLIP_GRADIENTS" in message
    assert torch.equal(model.line.weight, after_two.line.weight)


def test_errors_of_the_models_own_checks_name_the_images():
    class Diverged(Toy):
        def forward(self, batch: list[dict]) -> dict:
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")

    with pytest.raises(FloatingPointError, match=r"(?s)contain Inf/NaN.*iteration 0.*0\.jpg, 1"):
        run(batches(samples(4), 2), model=Diverged())


def test_losses_that_depend_on_no_parameter():
    class Constant(Toy):
        def forward(self, batch: list[dict]) -> dict:
            return {"loss": torch.zeros(())}

    model = Constant()
    before = model.line.weight.clone()
    run(batches(samples(4), 2), model=distribute(model))
    assert torch.equal(model.line.weight, before)


def test_bfloat16_is_used_and_comes_near():
    seen = []

    class Watched(Toy):
        def forward(self, batch: list[dict]) -> dict:
            seen.append(self.line(batch[0]["x"]).dtype)
            return super().forward(batch)

    data = batches(samples(24), 8)
    half, trainer = run(data, model=Watched(), dtype=torch.bfloat16)
    full, _ = run(data)
    assert set(seen) == {torch.bfloat16} and half.line.weight.dtype == torch.float32
    torch.testing.assert_close(half.line.weight, full.line.weight, atol=0.05, rtol=0.05)
    assert not torch.equal(half.line.weight, full.line.weight)
    assert not trainer.grad_scaler.is_enabled()


def test_precisions():
    def config(enabled: bool, precision: str) -> SimpleNamespace:
        amp = SimpleNamespace(ENABLED=enabled, PRECISION=precision)
        return SimpleNamespace(SOLVER=SimpleNamespace(AMP=amp))

    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert amp_dtype(config(False, "fp16"), cpu) is None
    assert amp_dtype(config(True, "auto"), cpu) is torch.bfloat16
    assert amp_dtype(config(True, "auto"), gpu) is torch.float16
    assert amp_dtype(config(True, "bf16"), gpu) is torch.bfloat16
    with pytest.raises(ValueError, match="'fp16' needs a GPU"):
        amp_dtype(config(True, "fp16"), cpu)
    with pytest.raises(ValueError, match="'half' is not one of"):
        amp_dtype(config(True, "half"), gpu)


def test_an_optimizer_of_another_shape_is_refused():
    _, trainer = run(batches(samples(4), 2))
    state = trainer.state_dict()
    two = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    other = StepTrainer(two, [], torch.optim.SGD(two.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"groups of \[2\] parameters, this run has \[4\]"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="ACCUMULATE must be at least 1"):
        StepTrainer(two, [], torch.optim.SGD(two.parameters(), lr=0.1), accumulate=0)

"""Tables and points of `speed.json`: ratios to the first method within one batch and precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .collect import Collected, Task, values_of
from .experiment import Experiment
from .plots import Point
from .speed import cell_name
from .subjects import INFERENCE, TRAINING
from .summary import summarize
from .tables import NONE, Cell, Table

Speed = Mapping[str, Any]


def settings_measured(speed: Speed) -> list[tuple[str, int]]:
    """Precisions and batch sizes that figures exist for, in the order of measuring."""
    found: dict[tuple[str, int], None] = {}
    for name, cell in speed["cells"].items():
        if cell:
            _, _, batch, precision = name.rsplit("|", 3)
            found[precision, int(batch)] = None
    precisions = list(dict.fromkeys(precision for precision, _ in found))
    return sorted(found, key=lambda item: (precisions.index(item[0]), item[1]))


def speed_table(experiment: Experiment, speed: Speed) -> Table:
    """Training and inference, time and memory: a row for each precision, batch size and method."""
    rows = []
    for precision, batch in settings_measured(speed):
        found = [
            {
                phase: speed["cells"].get(cell_name(method.name, phase, batch, precision), {})
                for phase in (TRAINING, INFERENCE)
            }
            for method in experiment.methods
        ]
        for method, cells in zip(experiment.methods, found, strict=True):
            row = [Cell(method.label), Cell(precision), Cell(str(batch))]
            for phase in (TRAINING, INFERENCE):
                row += _phase_cells(cells[phase], found[0][phase], phase, batch)
            rows.append(tuple(row))
    headers = (
        "method", "precision", "images", "training s / iteration", "time ratio", "training MiB",
        "inference images / s", "time ratio", "inference MiB",
    )  # fmt: skip
    note = (
        f"{speed['key']['machine']}. {speed['date']}. Medians (quartiles) of calls in which the "
        f"methods take turns, {speed['seconds']:g} s each; time ratio: to the first "
        "method, with the same precision and number of images. Training: forward, backward "
        "and optimizer on one batch; loading data is not in it. MiB: peak memory beyond weights, "
        f"optimizer state, inputs and results. {_weights_note(experiment, speed)}"
    )
    return Table("Speed and memory", headers, tuple(rows), note, labels=2)


def model_table(experiment: Experiment, speed: Speed) -> Table:
    """Parameters and FLOPs, beside the first method's."""
    rows = []
    first = speed["models"].get(experiment.methods[0].name, {})
    for method in experiment.methods:
        found = speed["models"].get(method.name, {})
        row = [Cell(method.label), Cell(found.get("size", NONE))]
        for key, unit in (("parameters", 1e6), ("products", 1e9), ("sampling", 1e9)):
            value, reference = found.get(key), first.get(key)
            ratio = (
                f"{value / reference:.2f} of the first" if value is not None and reference else ""
            )
            row.append(Cell(NONE if value is None else f"{value / unit:.2f}", ratio))
        row[-1] = Cell(row[-1].text, found.get("note", row[-1].detail))
        rows.append(tuple(row))
    headers = ("method", "image", "M parameters", "GFLOPs", "G sampling")
    note = (
        "Counted by fvcore, a multiply-add as one FLOP, at the configs' test size and numbers of "
        "RoIs. The last column's bilinear interpolations (in G) are not in "
        "the GFLOPs."
    )
    return Table("Parameters and FLOPs", headers, tuple(rows), note)


def tradeoff_points(
    experiment: Experiment, speed: Speed, collected: Collected, task: Task, metric: str
) -> tuple[list[Point], str]:
    """Methods with both AP and a time for an image, at the first precision and smallest batch.

    Returns:
        The points, and the setting of the times in words.
    """
    measured = settings_measured(speed)
    if not measured:
        return [], ""
    precision, batch = measured[0]
    points = []
    for method in experiment.methods:
        ap = summarize(list(values_of(collected, method.name, task, metric).values()))
        cell = speed["cells"].get(cell_name(method.name, INFERENCE, batch, precision), {})
        if ap is not None and cell.get("times"):
            points.append(Point(method, ap, [1e3 * t / batch for t in cell["times"]]))
    where = "GPU" if speed["device"].startswith("cuda") else "CPU"
    return points, f"{where}, {precision}, batch of {batch}"


def _phase_cells(
    cell: Mapping[str, Any], first: Mapping[str, Any], phase: str, batch: int
) -> Sequence[Cell]:
    peak = cell.get("peak")
    memory = Cell(NONE if peak is None else f"{peak / 2**20:.0f}")
    if not cell.get("times"):
        note = cell.get("note") or "not measured"
        return Cell(NONE, note, "failed" if cell.get("note") else "missing"), Cell(NONE), memory
    low, middle, high = cell["times"]
    if phase == TRAINING:
        time = Cell(_digits(middle), f"{_digits(low)} to {_digits(high)}")
    else:
        time = Cell(_digits(batch / middle), f"{_digits(batch / high)} to {_digits(batch / low)}")
    ratio = f"{middle / first['times'][1]:.2f}" if first.get("times") else NONE
    return time, Cell(ratio), memory


def _weights_note(experiment: Experiment, speed: Speed) -> str:
    weights = speed["key"]["weights"]
    untrained = [m.label for m in experiment.methods if not weights.get(m.name)]
    if not untrained:
        return "Trained weights, of each method's first run."
    which = "all methods" if len(untrained) == len(experiment.methods) else ", ".join(untrained)
    return f"Untrained weights, which may find more or fewer objects: {which}."


def _digits(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"

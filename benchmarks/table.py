"""The table that a benchmark prints: one row for a contestant in one pass of one case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tabulate import tabulate

from d2det.tools.measuring import timing


@dataclass
class Row:
    """One line of the table: what a contestant did in one pass of one case."""

    labels: tuple[str, ...]
    phase: str
    name: str
    times: list[float] = field(default_factory=list)  # seconds
    note: str = ""  # in place of a time
    peak: int | None = None
    syncs: int | None = None
    buffer: int = 0


def table(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """The markdown table. The first row of each case and pass is d2det's, which ratios refer to."""
    shares, syncs = any(r.buffer for r in rows), any(r.syncs is not None for r in rows)
    headers = [*columns, "pass", "contestant", "ms", "IQR", "this / d2det", "d2det / this"]
    headers += ["peak MiB"] + ["of im2col"] * shares + ["host syncs"] * syncs
    lines, first = [], None
    for row in rows:
        if first is None or (first.labels, first.phase) != (row.labels, row.phase):
            first = row
        lines.append([*row.labels, row.phase, row.name, *_times(row, first)])
        lines[-1].append("-" if row.peak is None else f"{row.peak / 2**20:.1f}")
        if shares:
            share = row.peak is not None and row.buffer
            lines[-1].append(f"{row.peak / row.buffer:.2f}" if share else "-")
        if syncs:
            lines[-1].append("-" if row.syncs is None else str(row.syncs))
    align = ["left"] * (len(columns) + 2) + ["right"] * (len(headers) - len(columns) - 2)
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True, colalign=align)


def _times(row: Row, first: Row) -> list[str]:
    if not row.times:
        return [row.note or "not measured", "-", "-", "-"]
    low, middle, high = timing.quartiles(row.times)
    cells = [_ms(middle), f"{_ms(low)} to {_ms(high)}"]
    if not first.times:
        return [*cells, "-", "-"]
    ratio = middle / timing.median(first.times)
    return [*cells, *(f"{r:.2f}" if r >= 0.1 else f"{r:.2g}" for r in (ratio, 1 / ratio))]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"

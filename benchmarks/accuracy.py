#!/usr/bin/env python3
"""Compare detectors by accuracy: `python -m d2det.tools.experiments run` under its earlier name.

    python benchmarks/accuracy.py configs/shapes/d2det.yaml configs/shapes/faster_rcnn.yaml \
        --seeds 1 2 3 --jobs 2 --output output/accuracy
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from d2det.tools.experiments.__main__ import main


def command(given: Sequence[str]) -> list[str]:
    """The new command line; --output need not be given here."""
    named = any(word.split("=")[0] == "--output" for word in given)
    return ["run", *([] if named else ["--output", "output/accuracy"]), *given]


if __name__ == "__main__":
    sys.exit(main(command(sys.argv[1:])))

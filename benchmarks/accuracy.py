#!/usr/bin/env python3
"""Compare detectors by accuracy: the same as `python -m d2det.tools.experiments run`.

    python benchmarks/accuracy.py configs/shapes/d2det.yaml configs/shapes/faster_rcnn.yaml \
        --seeds 1 2 3 --jobs 2 --output output/accuracy
"""

from __future__ import annotations

import sys

from d2det.tools.experiments.__main__ import main

if __name__ == "__main__":
    given = sys.argv[1:]
    if not any(word == "--output" or word.startswith("--output=") for word in given):
        given = ["--output", "output/accuracy", *given]
    sys.exit(main(["run", *given]))

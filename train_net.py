#!/usr/bin/env python3
"""Train and evaluate D2Det, or any detectron2 detector. `train_net.py --help` tells how."""

from __future__ import annotations

from d2det.engine.arguments import argument_parser
from d2det.engine.launch import launch
from d2det.engine.main import main

if __name__ == "__main__":
    launch(main, argument_parser().parse_args())

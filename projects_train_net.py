#!/usr/bin/env python3
"""`train_net.py` under its second name."""

from __future__ import annotations

from d2det.engine.arguments import argument_parser
from d2det.engine.launch import launch
from d2det.engine.main import main

if __name__ == "__main__":
    launch(main, argument_parser().parse_args())

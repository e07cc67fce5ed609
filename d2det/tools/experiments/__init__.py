"""Comparing detectors: lists of configs and seeds are run, collected and reported.

    python -m d2det.tools.experiments run experiments/shapes.yaml --output output/shapes
    python -m d2det.tools.experiments speed output/shapes
    python -m d2det.tools.experiments report output/shapes

An experiment's folder holds `experiment.json` (what was asked for), `<method>/settings.json` and
`<method>/seed<k>/` (a run: what `train_net.py` writes), `speed.json` and the reports.
"""

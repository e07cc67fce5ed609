"""Commands that look at models: `python -m d2det.tools.<name>`."""

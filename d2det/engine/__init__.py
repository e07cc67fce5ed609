"""Training, checkpoints and prediction on top of detectron2's engine."""

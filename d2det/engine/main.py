"""What `train_net.py` does: train and evaluate, or only evaluate."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from detectron2.evaluation import verify_results
from detectron2.utils import comm

from d2det.engine.arguments import argument_parser
from d2det.engine.launch import launch
from d2det.engine.setup import input_errors, setup
from d2det.engine.trained import load_trained, weights_to_evaluate
from d2det.engine.trainer import Trainer
from d2det.evaluation.report import write_report
from d2det.evaluation.tta import evaluate_with_tta


def main(args: Namespace) -> dict[str, Any]:
    """Train or evaluate as `args` say; runs in every process."""
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        with input_errors():
            load_trained(model, weights_to_evaluate(cfg, args.resume))
        results = Trainer.test(cfg, model)
    else:
        with input_errors():
            trainer = Trainer(cfg)
            trainer.resume_or_load(args.resume)
        model, results = trainer.model, trainer.train()
    if cfg.TEST.AUG.ENABLED:
        results.update(evaluate_with_tta(Trainer, cfg, model))
    if comm.is_main_process():
        write_report(cfg, results)
        if args.eval_only:  # after training, the trainer does
            verify_results(cfg, results)
    return results


if __name__ == "__main__":
    launch(main, argument_parser().parse_args())

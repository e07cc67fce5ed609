"""Train, evaluate and draw without detectron2.

    python -m d2det.torchvision --output output/quickstart
    python -m d2det.torchvision --model d2det_resnet50_fpn --train-json A.json --train-images A \
        --val-json B.json --val-images B --output output/mine --max-steps 20000 --lr 0.0025

Without data of one's own, on the generated images. `--resume` goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, save_image

import d2det.torchvision as models
from d2det.torchvision.data import CocoBoxes, collate

MODELS = [name for name in models.__all__ if name.startswith("d2det_")]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m d2det.torchvision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=MODELS, default="d2det_quickstart")
    parser.add_argument("--masks", action="store_true", help="instance segmentation")
    parser.add_argument("--train-json", type=Path, help="COCO-format annotations")
    parser.add_argument("--train-images", type=Path, help="their images' folder")
    parser.add_argument("--val-json", type=Path)
    parser.add_argument("--val-images", type=Path)
    parser.add_argument("--output", type=Path, default=Path("output/torchvision"))
    parser.add_argument("--max-steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--precision", default="32-true", help='Lightning\'s, e.g. "bf16-mixed"')
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-backbone-weights", action="store_true", help="train from scratch")
    parser.add_argument(
        "--resume", nargs="?", choices=("must", "auto", "no"), const="must", default="no",
        help="go on from the last checkpoint, which has to be there; auto: if it is",
    )  # fmt: skip
    parser.add_argument("--num-pictures", type=int, default=8)
    args = parser.parse_args(argv)
    own = [args.train_json, args.train_images, args.val_json, args.val_images]
    if any(own) and not all(own):
        parser.error("--train-json, --train-images, --val-json and --val-images come together")
    return args


def data(args: argparse.Namespace) -> tuple[CocoBoxes, CocoBoxes]:
    """The training and the validation set: the user's, or the generated one."""
    if args.train_json is not None:
        train = CocoBoxes(args.train_json, args.train_images, train=True, masks=args.masks)
        val = CocoBoxes(args.val_json, args.val_images, train=False, masks=args.masks)
    else:
        from d2det.data.generated import write_dataset
        from d2det.data.generated_names import DEFAULT_SEED, DEFAULT_SIZE, SPLITS

        sets = []
        for split in ("train", "val"):
            path = write_dataset(
                "datasets/shapes",
                split,
                num_images=SPLITS[split],
                size=DEFAULT_SIZE,
                seed=DEFAULT_SEED,
            )
            sets.append(
                CocoBoxes(path, path.parent / "images", train=split == "train", masks=args.masks)
            )
        train, val = sets
    if train.category_ids != val.category_ids:
        raise SystemExit(
            f"error: the categories differ: {train.class_names} in training and "
            f"{val.class_names} in validation"
        )
    return train, val


def build(args: argparse.Namespace, num_classes: int) -> models.D2Det:
    keywords: dict[str, Any] = {"num_classes": num_classes + 1}
    if args.masks:
        keywords["masks"] = True
    if args.no_backbone_weights:
        keywords["weights_backbone"] = None
    return getattr(models, args.model)(**keywords)


def write_pictures(model: models.D2Det, val: CocoBoxes, folder: Path, number: int) -> None:
    """Detections with a score of at least 0.3, as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    model.eval()
    device = next(model.parameters()).device
    for index in range(min(number, len(val))):
        image, target = val[index]
        with torch.no_grad():
            (found,) = model([image.to(device)])
        kept = found["scores"].cpu() >= 0.3
        boxes, labels, scores = (found[k].cpu()[kept] for k in ("boxes", "labels", "scores"))
        names = [
            f"{val.class_names[label - 1]} {score:.2f}"
            for label, score in zip(labels.tolist(), scores.tolist(), strict=True)
        ]
        picture = image
        if "masks" in found:
            picture = draw_segmentation_masks(picture, found["masks"].cpu()[kept, 0] > 0.5)
        if len(boxes):
            picture = draw_bounding_boxes(picture, boxes, names, width=2)
        save_image(picture, folder / f"{target['image_id']}.png")


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    from d2det.torchvision.training import DetectorModule, L

    L.seed_everything(args.seed, workers=True)
    train, val = data(args)
    model = build(args, len(train.class_names))
    module = DetectorModule(
        model,
        lr=args.lr,
        max_steps=args.max_steps,
        warmup_steps=args.warmup_steps,
        class_names=train.class_names,
        masks=args.masks,
    )
    train_loader: DataLoader = DataLoader(
        train, args.batch_size, shuffle=True, num_workers=args.workers, collate_fn=collate,
        drop_last=len(train) >= args.batch_size,
    )  # fmt: skip
    val_loader: DataLoader = DataLoader(
        val, args.batch_size, num_workers=args.workers, collate_fn=collate
    )
    checkpoints = L.pytorch.callbacks.ModelCheckpoint(
        args.output, save_last=True, every_n_train_steps=200
    )
    last = args.output / "last.ckpt"
    if last.exists() and args.resume == "no":
        raise SystemExit(f"error: {last} is there: add --resume, or choose another --output")
    if not last.exists() and args.resume == "must":
        raise SystemExit(f"error: there is no {last} to resume from: --resume=auto starts anew")
    trainer = L.Trainer(
        max_steps=args.max_steps,
        devices=1,
        precision=args.precision,
        gradient_clip_val=5.0,  # from scratch, plain SGD at this rate diverges without it
        default_root_dir=args.output,
        logger=L.pytorch.loggers.CSVLogger(args.output, name="logs"),
        callbacks=[checkpoints],
        check_val_every_n_epoch=None,
        val_check_interval=None,
        limit_val_batches=0,
        log_every_n_steps=20,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, train_loader, ckpt_path=str(last) if last.exists() else None)
    evaluator = L.Trainer(
        logger=False,
        devices=1,
        precision=args.precision,
        default_root_dir=args.output,
        enable_model_summary=False,
    )
    (metrics,) = evaluator.validate(module, val_loader, verbose=False)
    torch.save(model.state_dict(), args.output / "model_final.pth")
    known = {name: None if math.isnan(value) else value for name, value in metrics.items()}
    (args.output / "results.json").write_text(json.dumps(known, indent=1))
    write_pictures(model, val, args.output / "pictures", args.num_pictures)
    for name, value in metrics.items():
        print(f"{name:20} {value:6.2f}")
    print(f"Model: {args.output / 'model_final.pth'}\nPictures: {args.output / 'pictures'}")


if __name__ == "__main__":
    main()

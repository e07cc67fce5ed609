"""The command line of train_net.py."""

from __future__ import annotations

import pytest

pytest.importorskip("detectron2")
from detectron2.engine import default_argument_parser

from d2det.engine.arguments import argument_parser


def parse(*args):
    return argument_parser().parse_args(list(args))


@pytest.mark.parametrize(
    ("args", "resume", "opts"),
    [
        ([], "no", []),
        (["--resume"], "must", []),
        (["--resume", "SEED", "1"], "must", ["SEED", "1"]),
        (["--resume", "--eval-only"], "must", []),
        (["--resume=auto", "SEED", "1"], "auto", ["SEED", "1"]),
        (["--resume", "auto", "SEED", "1"], "auto", ["SEED", "1"]),
        (["--resume=must"], "must", []),
        (["--eval-only", "SEED", "-1"], "no", ["SEED", "-1"]),
    ],
)
def test_resume_does_not_swallow_overrides(args, resume, opts):
    parsed = parse(*args)
    assert parsed.resume == resume
    assert parsed.opts == opts


def test_unknown_resume_choice_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse("--resume=maybe")
    assert "maybe" in capsys.readouterr().err


def test_everything_detectron2_offers_is_there():
    ours = {option for action in argument_parser()._actions for option in action.option_strings}
    theirs = default_argument_parser()._actions
    assert {option for action in theirs for option in action.option_strings} <= ours


def test_test_data_under_either_name():
    assert parse("--val-json", "a.json", "--val-images", "b").val_json == "a.json"
    parsed = parse("--test-json", "a.json", "--test-images", "b")
    assert (parsed.val_json, parsed.val_images) == ("a.json", "b")
    assert parsed.train_json is None

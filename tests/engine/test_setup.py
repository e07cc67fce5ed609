"""Configs by name, and what is said of bad input before anything starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("detectron2")
from detectron2.data import DatasetCatalog, MetadataCatalog

import d2det
from d2det.engine import configs, launch, setup
from d2det.engine.arguments import argument_parser
from d2det.engine.configs import config_names, find_config
from d2det.engine.setup import InputError, get_cfg, prepare

ROOT = Path(__file__).parents[2]


@pytest.fixture
def prepared(tiny_yaml, coco_data, tmp_path):
    """A function from arguments to the prepared config of a tiny detector on the tiny data."""

    def run(*args, config=tiny_yaml, train="train", val="val", opts=()):
        line = ["--config-file", str(config), *map(str, args)]
        for split, name in (("train", train), ("val", val)):
            if name:
                line += [f"--{split}-json", str(coco_data / f"{name}.json")]
                line += [f"--{split}-images", str(coco_data / "images")]
        line += [str(item) for item in ("OUTPUT_DIR", tmp_path / "run", *opts)]
        return prepare(argument_parser().parse_args(line))

    return run


def test_config_by_name_path_and_from_anywhere(tmp_path, monkeypatch):
    file = ROOT / "configs" / "quickstart.yaml"
    assert find_config("quickstart") == find_config("quickstart.yaml") == file
    assert find_config(file) == file
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/quickstart.yaml") == file
    name = "COCO-Detection/d2det_R_50_FPN_2x"
    assert find_config(name) == ROOT / "configs" / f"{name}.yaml"
    assert name in config_names()
    assert not any("Base-" in known for known in config_names())


def test_files_nearby_go_before_the_projects(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.yaml").write_text("SEED: 5\nVERSION: 2\n")
    assert get_cfg("quickstart").SEED == 5


def test_configs_of_an_installed_package(tmp_path, monkeypatch):
    package = tmp_path / "d2det"
    shutil.copytree(ROOT / "configs", package / "configs")
    (package / "engine").mkdir()
    monkeypatch.setattr(configs, "__file__", str(package / "engine" / "configs.py"))
    assert find_config("quickstart") == package / "configs" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("quickstrat", "quickstart"),
        ("COCO-Detection/d2det_R50_FPN_2x", "COCO-Detection/d2det_R_50_FPN_2x"),
        ("d2det_R_50_FPN_2x.yaml", "COCO-Detection/d2det_R_50_FPN_2x"),
    ],
)
def test_unknown_config_names_close_ones(wrong, meant):
    with pytest.raises(FileNotFoundError, match=f"did you mean .*{meant}"):
        get_cfg(wrong)


def test_every_config_of_the_project_loads():
    for name in config_names():
        assert get_cfg(name).MODEL.META_ARCHITECTURE


def test_lazy_config_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"LazyConfig\.load.*d2det\.Predictor"):
        get_cfg("some_config.py")


def test_get_cfg_has_the_keys_of_both():
    cfg = d2det.get_cfg()
    assert cfg.MODEL.ROI_DENSE_REGRESSION_HEAD.NUM_CONV == 8
    assert cfg.SOLVER.MAX_ITER == 40000
    assert not cfg.is_frozen()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_gpu_the_cpu_is_used_with_one_warning(tmp_path, caplog):
    setup._warn_no_gpu.cache_clear()
    for _ in range(2):
        assert get_cfg().MODEL.DEVICE == "cpu"
    assert [r.levelname for r in caplog.records if "GPU" in r.message] == ["WARNING"]


def test_unknown_keys_are_all_named_with_file_and_likely_meaning(tmp_path):
    (tmp_path / "base.yaml").write_text("MODEL: {ROI_HEADS: {NUM_CLASES: 3}}\nVERSION: 2\n")
    file = tmp_path / "leaf.yaml"
    file.write_text("_BASE_: base.yaml\nSOLVR: {MAX_ITER: 3}\nMODEL: {MAX_ITER: 3}\n")
    with pytest.raises(ValueError, match="unknown config key") as error:
        get_cfg(file)
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"{file}: unknown config key SOLVR")
    assert "SOLVER" in lines[0]
    assert lines[1].startswith(f"{file}: unknown config key MODEL.MAX_ITER")
    assert "SOLVER.MAX_ITER" in lines[1]
    assert lines[2].startswith(f"{tmp_path / 'base.yaml'}: unknown config key")
    assert "did you mean MODEL.ROI_HEADS.NUM_CLASSES" in lines[2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("SOLVER: {MAX_ITER: abc}\nVERSION: 2\n", r"x\.yaml: .*SOLVER\.MAX_ITER"),
        ("SOLVER: {MAX_ITER: [", r"x\.yaml: not valid yaml"),
        ("", r"x\.yaml: not a config"),
        ("just text", r"x\.yaml: not a config"),
        ("_BASE_: none.yaml\nVERSION: 2\n", r"x\.yaml: its _BASE_ .*none\.yaml does not exist"),
        ("SEED: !!python/object/apply:os.getpid []\nVERSION: 2\n", r"x\.yaml: not valid yaml"),
    ],
)
def test_broken_config_files(tmp_path, content, message):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        get_cfg(tmp_path / "x.yaml")


def test_data_from_the_command_line(prepared):
    cfg = prepared("--num-processes", 1, opts=["SOLVER.MAX_ITER", 7])
    assert cfg.is_frozen()
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("custom_train",), ("custom_val",))
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == 3
    assert cfg.SOLVER.MAX_ITER == 7
    assert len(DatasetCatalog.get("custom_train")) == 3
    cfg = prepared(train="two", val="two")  # again in the same process, with other data
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    assert MetadataCatalog.get("custom_train").thing_classes == ["red", "green"]


def test_test_data_without_annotations_takes_the_training_categories(prepared):
    cfg = prepared(val="bare")
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert MetadataCatalog.get("custom_val").thing_classes == ["red", "green", "blue"]


def test_training_data_alone_is_not_evaluated(prepared):
    assert prepared(val=None).DATASETS.TEST == ()


def test_the_schedule_is_scaled_but_not_what_was_typed(prepared):
    plain = prepared().SOLVER
    images = plain.IMS_PER_BATCH
    scaled = prepared(
        opts=["SOLVER.REFERENCE_IMS_PER_BATCH", 2 * images, "SOLVER.MAX_ITER", 33]
    ).SOLVER
    assert scaled.BASE_LR == pytest.approx(plain.BASE_LR / 2)
    assert scaled.MAX_ITER == 33


def test_cpu_processes_run_on_the_cpu(prepared):
    assert prepared("--num-processes", 2, opts=["MODEL.DEVICE", "cuda"]).MODEL.DEVICE == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"opts": ["SOLVER.MAXITER", 3]}, r"unknown config key SOLVER\.MAXITER.*SOLVER\.MAX_ITER"),
        ({"opts": ["SEED"]}, "SEED has no value"),
        ({"opts": ["SEED", 1, "--num-gpus", 2]}, "--num-gpus stands after config keys"),
        ({"opts": ["SOLVER.MAX_ITER", "many"]}, r"command line: .*SOLVER\.MAX_ITER"),
        ({"opts": ["MODEL.ROI_HEADS.NUM_CLASSES", 80]}, "NUM_CLASSES is 80.* has 3 classes"),
        ({"val": "two"}, "different classes"),
        ({"train": "bare"}, "holds no box to train on"),
        ({"train": "none"}, r"none\.json .*is not there"),
        ({"opts": ["MODEL.WEIGHTS", "no/such.pth"]}, r"weights no/such\.pth do not exist"),
        ({"args": ["--resume"]}, "nothing to resume: .*--resume=auto"),
        ({"args": ["--eval-only"]}, r"MODEL\.WEIGHTS is empty"),
        ({"args": ["--train-images", "x"], "train": None}, "belong together"),
        ({"train": None, "val": None}, r"DATASETS\.TRAIN is empty"),
        ({"opts": ["MODEL.MIMIC.ENABLED", True]}, "needs .* MimickingRCNN"),
        ({"config": "quickstrat"}, "did you mean quickstart"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)
def test_bad_input(prepared, arguments, message):
    arguments = dict(arguments)
    args = arguments.pop("args", ())
    with pytest.raises(InputError, match=message):
        prepared(*args, **arguments)


def test_missing_config_lists_what_there_is():
    with pytest.raises(InputError, match="--config-file is needed.*quickstart"):
        prepare(argument_parser().parse_args([]))


def test_data_of_another_run_is_explained(prepared, tmp_path, tiny_yaml):
    for name in ("custom_train", "custom_val"):
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    opts = ["DATASETS.TRAIN", "('custom_train',)"]
    with pytest.raises(InputError, match=r"custom_train .*another run: give --train-json"):
        prepared(train=None, val=None, opts=opts)
    weights = tmp_path / "w.pth"
    torch.save({"model": {}}, weights)
    opts += ["MODEL.WEIGHTS", weights]  # evaluation does without the training data
    assert prepared("--eval-only", train=None, opts=opts).DATASETS.TEST == ("custom_val",)


def test_resume_modes(prepared, tmp_path):
    assert prepared("--resume=auto")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last_checkpoint").write_text("model_final.pth")
    missing = ["MODEL.WEIGHTS", "gone.pth"]  # not needed by a run that goes on
    assert prepared("--resume", opts=missing)
    assert prepared("--resume=auto", opts=missing)
    assert prepared("--eval-only", "--resume")
    with pytest.raises(InputError, match="gone"):
        prepared(opts=missing)


def test_preparing_writes_nothing(prepared, tmp_path):
    prepared()
    assert not (tmp_path / "run").exists()


def test_setup_writes_config_log_and_classes(tiny_yaml, coco_data, tmp_path):
    line = ["--config-file", str(tiny_yaml)]
    for split in ("train", "val"):
        line += [f"--{split}-json", str(coco_data / f"{split}.json")]
        line += [f"--{split}-images", str(coco_data / "images")]
    cfg = setup.setup(argument_parser().parse_args([*line, "OUTPUT_DIR", str(tmp_path / "run")]))
    assert cfg.is_frozen()
    classes = json.loads((tmp_path / "run" / "classes.json").read_text())
    assert classes == {"classes": ["red", "green", "blue"]}
    again = get_cfg(tmp_path / "run" / "config.yaml")
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())
    assert "Full config saved" in (tmp_path / "run" / "log.txt").read_text()
    kept = tmp_path / "run" / "classes.json"
    kept.write_text('{"classes": ["of", "the", "training"]}')
    weights = tmp_path / "weights.pth"
    weights.touch()
    line += ["--eval-only", "OUTPUT_DIR", str(tmp_path / "run"), "MODEL.WEIGHTS", str(weights)]
    setup.setup(argument_parser().parse_args(line))
    assert "training" in kept.read_text()


class TestLaunch:
    """Processes, and messages in place of tracebacks."""

    @staticmethod
    def args(*line):
        return argument_parser().parse_args(["--config-file", "quickstart", *line])

    def test_one_process_is_this_one(self):
        calls = []
        launch.launch(calls.append, self.args())
        assert len(calls) == 1

    def test_bad_input_is_a_message_and_status_2(self, capsys):
        def main(args):
            raise InputError("no such thing")

        with pytest.raises(SystemExit) as end:
            launch.launch(main, self.args())
        assert end.value.code == 2
        assert capsys.readouterr().err == "error: no such thing\n"

    def test_bad_input_in_a_process_is_a_message_too(self, capsys, monkeypatch):
        def raised(text):
            def start(*args, **kwargs):
                raise launch.mp.ProcessRaisedException(text, 0, 1)

            return start

        monkeypatch.setattr(launch, "prepare", lambda args: None)
        text = "Traceback:\n  ...\nd2det.engine.setup.InputError: weights w.pth\ndo not fit\n"
        monkeypatch.setattr(launch.mp, "start_processes", raised(text))
        with pytest.raises(SystemExit) as end:
            launch.launch(print, self.args("--num-processes", "2"))
        assert end.value.code == 2
        assert capsys.readouterr().err == "error: weights w.pth\ndo not fit\n"
        monkeypatch.setattr(launch.mp, "start_processes", raised("ZeroDivisionError: oh"))
        with pytest.raises(launch.mp.ProcessRaisedException):
            launch.launch(print, self.args("--num-processes", "2"))

    def test_other_errors_keep_their_traceback(self):
        def main(args):
            raise ValueError("a bug")

        with pytest.raises(ValueError, match="a bug"):
            launch.launch(main, self.args())

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (["--num-machines", "2"], "--dist-url"),
            (["--machine-rank", "1"], "--machine-rank 1"),
            (["--num-processes", "-1"], "negative"),
        ],
    )
    def test_bad_numbers(self, capsys, line, message):
        with pytest.raises(SystemExit):
            launch.launch(lambda args: pytest.fail("must not run"), self.args(*line))
        assert message in capsys.readouterr().err

    def test_more_gpus_than_there_are(self, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(SystemExit):
            launch.launch(lambda args: None, self.args("--num-gpus", "4"))
        assert "--num-gpus 4, but this machine has 1" in capsys.readouterr().err

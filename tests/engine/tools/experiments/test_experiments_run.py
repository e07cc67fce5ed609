"""Which runs are made, where and with what; failures, signals and other processes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import d2det
from d2det.tools.experiments import devices, runner
from d2det.tools.experiments.__main__ import main
from d2det.tools.experiments.devices import find_slots
from d2det.tools.experiments.experiment import from_configs, load_experiment, to_json
from d2det.tools.experiments.folders import claim, recorded, runs_of, settings_of, state
from d2det.tools.experiments.job import Job, last_line
from d2det.tools.experiments.lock import Busy
from d2det.tools.experiments.progress import Display, position

# What stands for train_net.py: notes that it ran, and does as the name of its method says.
PROGRAM = """
import json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
print("\\nseed", sys.argv[2], "on", os.environ.get("CUDA_VISIBLE_DEVICES", "the CPU"), flush=True)
if folder.parent.name == "bad":
    if os.fork() == 0:  # a data worker that outlives the crash
        time.sleep(600)
    print("10%\\r20%\\rValueError: no such thing\\n")
    sys.exit(3)
if folder.parent.name == "slow":
    if os.fork() == 0:  # a data worker
        time.sleep(600)
    (folder / "started").touch()
    time.sleep(600)
(folder / "results.json").write_text(json.dumps({"val": {"bbox": {"AP": 10.0}}}))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder as the current one, with configs good, bad and slow."""
    monkeypatch.chdir(tmp_path)
    for name in ("good", "bad", "slow"):
        Path(f"{name}.yaml").write_text("SOLVER: {MAX_ITER: 7}\n")
    return tmp_path


@pytest.fixture
def started(monkeypatch):
    """Runs are `PROGRAM`; the list of those that were started."""
    found = []

    def command(run, train_args):
        found.append((run.method.name, run.seed))
        return [sys.executable, "-c", PROGRAM, str(run.folder), str(run.seed)]

    monkeypatch.setattr(runner, "command_of", command)
    return found


def test_runs_what_is_not_done_and_goes_on_after_failures(place, started, capsys):
    line = ["run", "bad.yaml", "good.yaml", "--output", "out", "--seeds", "1", "2"]
    assert main(line) == 1
    assert started == [("bad", 1), ("good", 1), ("bad", 2), ("good", 2)]
    error = capsys.readouterr().err
    assert "error: bad, seed 2: ValueError: no such thing (all of it: out/bad/seed2/" in error
    assert json.loads(Path("out/bad/seed1/failure.json").read_text())["returncode"] == 3
    assert "ValueError: no such thing" in Path("out/report.html").read_text()
    assert not left_over(str(Path("out/bad/seed1")))
    assert main(line) == 1
    assert started[4:] == [("bad", 1), ("bad", 2)]  # once more; what is done is left alone
    assert "4 runs, 2 of them done already" in capsys.readouterr().err
    assert main(["run", "good.yaml", "--output", "out", "--seeds", "1"]) == 0
    assert len(started) == 6
    # The report knows what other calls asked for.
    whole = recorded(Path("out"))
    assert [m.name for m in whole.methods] == ["good", "bad"] and whole.seeds == (1, 2)
    assert len(json.loads(Path("out/calls.json").read_text())) == 3


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_children_and_the_next_call_goes_on(place, number):
    root = str(Path(d2det.__file__).parents[1])
    code = (
        "import sys; from d2det.tools.experiments import runner, __main__ as m\n"
        f"start = [sys.executable, '-c', {PROGRAM!r}]\n"
        "runner.command_of = lambda run, _: [*start, str(run.folder), '1']\n"
        "sys.exit(m.main(['run', 'good.yaml', 'slow.yaml', '--output', 'out', '--seeds', '1']))"
    )
    environment = {**os.environ, "PYTHONPATH": root}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True
    ) as tool:
        try:
            mark, end = Path("out/slow/seed1/started"), time.monotonic() + 300
            while not mark.exists():
                assert tool.poll() is None and time.monotonic() < end
                time.sleep(0.05)
            tool.send_signal(number)
            error = tool.communicate(timeout=120)[1]
        finally:
            tool.kill()
    assert tool.returncode == 128 + number
    assert f"Stopped by {number.name}" in error and "slow, seed 1 starts" in error
    assert not left_over(str(Path("out/slow/seed1")))
    assert state(Path("out/slow/seed1")).kind == "unfinished"
    assert "1 of 2 runs done (1 unfinished)" in Path("out/report.html").read_text()


def left_over(text: str) -> list[str]:
    """Commands that mention a text, of processes that are still there after a while."""
    for _ in range(100):  # what is killed takes a moment to go
        command = ["ps", "-ewwo", "stat,args"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        there = [line for line in found.splitlines() if text in line and line[0] != "Z"]
        if not there:
            break
        time.sleep(0.1)
    return there


def test_a_run_that_another_process_is_at_is_left_alone(place, started, capsys):
    experiment = from_configs(["slow.yaml"], [1], [])
    (run,) = runs_of(experiment, Path("out"))
    job = Job(run, find_slots()[0], [sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with pytest.raises(Busy, match="another process is at"):
            Job(run, find_slots()[0], ["true"])
        assert main(["run", "slow.yaml", "--output", "out", "--seeds", "1"]) == 1
        assert "another process is at out/slow/seed1" in capsys.readouterr().err
        assert "0 of 1 runs done (1 running)" in Path("out/report.html").read_text()
    finally:
        job.end()
    Job(run, find_slots()[0], ["true"]).end()  # free again
    assert state(run.folder).kind == "unfinished"


def test_other_settings_are_refused(place, started, capsys):
    line = ["run", "good.yaml", "--output", "out", "--seeds", "1"]
    assert main([*line, "--train-args", "SOLVER.BASE_LR", "0.5"]) == 0
    assert main(line) == 1
    assert "--train-args SOLVER.BASE_LR 0.5 there, none now" in capsys.readouterr().err
    Path("good.yaml").write_text("SOLVER: {MAX_ITER: 8}\n")
    assert main([*line, "--train-args", "SOLVER.BASE_LR", "0.5"]) == 1
    assert "SOLVER.MAX_ITER 7 there, 8 now" in capsys.readouterr().err
    assert len(started) == 1


def test_a_key_that_is_new_since_then_is_no_other_setting(place):
    experiment = from_configs(["good.yaml"], [1], [])
    claim(experiment, Path("out"))
    note = Path("out/good/settings.json")
    noted = json.loads(note.read_text())
    assert "ACCUMULATE: 1" in noted["config"]
    noted["config"] = noted["config"].replace("  ACCUMULATE: 1\n", "")
    noted["config"] = noted["config"].replace("DEVICE: cpu", "DEVICE: cuda")
    note.write_text(json.dumps(noted))
    claim(experiment, Path("out"))
    Path("good.yaml").write_text("SOLVER: {MAX_ITER: 7, ACCUMULATE: 2}\n")
    with pytest.raises(ValueError, match=r"holds runs of other settings \(SOLVER.ACCUMULATE 1 the"):
        claim(experiment, Path("out"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["SEED", "3"], "SEED is set by this tool"),
        (["--eval-only"], "--eval-only is set by this tool"),
        (["--resume"], "--resume is set by this tool"),
        (["SOLVER.BASE_LRR", "3"], "unknown config key SOLVER.BASE_LRR"),
        (["--no-such-option"], "train_net.py refuses"),
    ],
)
def test_arguments_that_are_wrong_are_named_before_anything_runs(place, given, message):
    (method,) = from_configs(["good.yaml"], [1], []).methods
    with pytest.raises(ValueError, match=message):
        settings_of(method, tuple(given))


def test_gpus_are_shared_out(monkeypatch):
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    names = [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in find_slots()]
    assert names == ["0", "1", "2", "3"]
    assert [s.name for s in find_slots(jobs=2, per_run=2)] == ["GPU 0,1", "GPU 2,3"]
    assert [s.name for s in find_slots(per_run=3)] == ["GPU 0,1,2"]
    assert [s.name for s in find_slots(gpus=["2"])] == ["GPU 2"]
    (slot,) = find_slots(gpus=[])
    assert slot.environment["CUDA_VISIBLE_DEVICES"] == "" and slot.name == "CPU"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7,GPU-a,GPU-b")
    assert [s.name for s in find_slots(jobs=3)] == ["GPU 5", "GPU 7", "GPU GPU-a"]
    assert len(find_slots(jobs=5)) == 4  # a command written for a larger machine still runs
    with pytest.raises(ValueError, match="--num-gpus 8, but there are 4"):
        find_slots(per_run=8)


def test_jobs_share_the_cores(monkeypatch):
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(devices, "usable_cores", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert find_slots()[0].environment == {"OMP_NUM_THREADS": "7"}
    slots = find_slots(jobs=3)
    assert [s.name for s in slots] == ["CPU 0", "CPU 1", "CPU 2"]
    assert all(s.environment == {"OMP_NUM_THREADS": "2"} for s in slots)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert find_slots()[0].environment == {"OMP_NUM_THREADS": "1"}
    with pytest.raises(ValueError, match="--jobs must be at least 1"):
        find_slots(jobs=0)


def test_two_runs_at_a_time_on_two_gpus(place, started, monkeypatch):
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("d2det.tools.experiments.calls.machine.describe", lambda device: device)
    assert main(["run", "good.yaml", "--output", "out", "--seeds", "1", "2", "3"]) == 0
    where = [Path(f"out/good/seed{s}/console.txt").read_text().split()[-1] for s in (1, 2, 3)]
    assert set(where) <= {"0", "1"} and where[:2] == ["0", "1"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_progress_says_where_each_run_is(place, stream, monkeypatch):
    monkeypatch.setattr("d2det.tools.experiments.progress._LINE_EVERY", 0.0)
    (run,) = runs_of(from_configs(["good.yaml"], [1], []), Path("out"))
    job = Job(run, find_slots()[0], ["true"])
    assert position(run).text == "starting"
    (run.folder / "config.yaml").write_text("SOLVER: {MAX_ITER: 200}")
    (run.folder / "metrics.json").write_text(
        '{"iteration": 19, "time": 1.0}\n{"iteration": 39, "time": 2.0}\n{"iteration": 59, "ti'
    )
    assert position(run) == (40, 200, 320.0)
    assert position(run).text == "iteration 40 of 200, 05:20 left"
    output = stream()
    display = Display(output)
    display.start(2, 0)
    display.started(job)
    display.update([job])
    assert "iteration 40 of 200, 05:20 left" in output.getvalue()
    (run.folder / "metrics.json").write_text('{"iteration": 199, "time": 2.0}\n')
    assert position(run).text == "200 iterations, evaluating"
    display.ended(job, True)
    display.close()
    job.end()
    assert "good, seed 1: done after" in output.getvalue()


def test_last_line_is_a_bars_last_state(tmp_path):
    file = tmp_path / "console.txt"
    file.write_text("a\n 10%\r 20%\r\n  \n")
    assert last_line(file) == "20%"
    assert last_line(tmp_path / "none") == ""


def test_experiment_file(place):
    Path("e.yaml").write_text(
        "title: T\nseeds: [3, 3, 1]\ntrain_args: --num-gpus 2 SOLVER.STEPS '(1, 2)'\nmethods:\n"
        "- good.yaml\n"
        "- {name: other, label: Other one, config: shapes/d2det, overrides: {MODEL: {MASK_ON: "
        "true}, SOLVER.STEPS: [1, 2], SOLVER.LR_SCHEDULER_NAME: WarmupCosineLR}}\n"
    )
    experiment = load_experiment("e.yaml")
    assert experiment.seeds == (3, 1) and experiment.title == "T"
    assert experiment.train_args == ("--num-gpus", "2", "SOLVER.STEPS", "(1, 2)")
    good, other = experiment.methods
    assert (good.name, good.label, good.config) == ("good", "good", "good.yaml")
    assert other.overrides == (
        "MODEL.MASK_ON", "True", "SOLVER.STEPS", "[1, 2]",
        "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR",
    )  # fmt: skip
    assert settings_of(other, experiment.train_args)["train_args"][-6:] == list(other.overrides)
    claim(experiment, Path("out"))
    assert to_json(recorded(Path("out"))) == to_json(experiment)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods: []", "methods: a list of at least one"),
        ("methods: [good.yaml]\nsedes: [1]", "unknown sedes; known are description"),
        ("methods: [good.yaml]\nseeds: 3", "seeds: a list of whole numbers is needed, not 3"),
        ("methods: [{label: x}]", "method 1: config is missing"),
        ("methods: [{config: good.yaml, lable: x}]", "method 1: unknown lable"),
        ("methods: [{config: good.yaml, name: a/b}]", "name 'a/b' is no folder's name"),
        ("methods: [{config: good.yaml, published: 3}]", "published: {task: {metric"),
        ("methods: [good.yaml, good.yaml]", "methods with the same name, good"),
        ("methods: [god.yaml]", "config god.yaml does not exist"),
        ("methods: [good.yaml]\ntrain_args: 3", "train_args: a line of words or a list"),
    ],
)
def test_mistakes_in_an_experiment_file_are_named(place, text, message):
    Path("e.yaml").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace("(", "\\(")):
        load_experiment("e.yaml")


def test_an_experiment_stands_alone(place, capsys):
    Path("e.yaml").write_text("methods: [good.yaml]")
    assert main(["run", "e.yaml", "bad.yaml", "--output", "out"]) == 1
    assert "e.yaml is an experiment: give it alone" in capsys.readouterr().err

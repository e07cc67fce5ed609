"""The set-up's decisions, with fakes in place of pip, git and the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import environment
import pytest
import setup_env
import steps
import toolchain
from environment import Environment, Result, SetupError
from project import Project, release_of
from steps import Gap

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TORCH = {
    "python": "3.11.7",
    "torch": "2.12.1+cu130",
    "torchvision": "0.27.1",
    "torch_cuda": "13.0",
    "torch_folder": "site-packages",
    "gpu": False,
    "pins": ["torch==2.12.1", "torchvision==0.27.1"],
}


class FakeEnvironment(Environment):
    """Keeps the commands it is given; those that contain a word of `failing` fail."""

    def __init__(self, folder: Path, failing: tuple[str, ...] = ()) -> None:
        super().__init__(folder)
        self.failing = failing
        self.commands: list[str] = []
        self.variables: list[dict[str, str]] = []
        self.answers: list[str | None] = []

    def run(self, *command: str | Path, env: dict[str, str] | None = None) -> Result:
        text = " ".join(map(str, command))
        self.commands.append(text)
        self.variables.append(env or {})
        return Result(not any(word in text for word in self.failing), "some output\nthe last line")

    def ask(self, code: str) -> str | None:
        return self.answers.pop(0)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project.read(ROOT)._replace(root=tmp_path, detectron2_commit=COMMIT)


@pytest.fixture
def _all_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps.shutil, "which", lambda name: f"bin/{name}")
    monkeypatch.setattr(toolchain, "find_cxx", lambda: "bin/c++")
    monkeypatch.setattr(toolchain, "has_python_headers", lambda: True)
    monkeypatch.setattr(toolchain, "find_cuda_toolkit", lambda cuda: (None, "no nvcc"))


def test_release_of_versions_as_torch_writes_them() -> None:
    assert release_of("2.11") == (2, 11)
    assert release_of("2.15.0+cu132") == (2, 15)
    assert release_of("2.9.0a0+git12345") == (2, 9)
    assert release_of("") == (0, 0)


@pytest.mark.parametrize(
    ("about", "fits"),
    [
        ({"torch": "2.11.0", "torchvision": "0.26.0"}, True),
        ({"torch": "3.0.0", "torchvision": "1.0.0"}, True),
        ({"torch": "2.9.1", "torchvision": "0.24.1"}, False),
        ({"torch": "2.11.0"}, False),
        ({}, False),
    ],
)
def test_which_torch_fits(about: dict[str, Any], fits: bool) -> None:
    assert steps.has_fitting_torch(about, (2, 11)) is fits


def test_the_torch_asked_for_is_a_range(project: Project) -> None:
    assert project.minimum_torch == (2, 11)
    assert len(project.torch_requirements) == 2
    assert not any("==" in name for name in project.torch_requirements)


def test_a_torch_that_fits_is_kept(
    tmp_path: Path, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "probe", lambda python: TORCH)
    env = FakeEnvironment(tmp_path)
    assert steps.install_torch(env, project) == TORCH
    assert env.commands == []
    steps.install_packages(env, project, TORCH)  # and no other package may replace it
    assert f"-c {tmp_path / 'constraints.txt'}" in env.commands[0]
    assert (tmp_path / "constraints.txt").read_text().split() == TORCH["pins"]


def test_torch_is_installed_where_none_fits_and_checked_afterwards(
    tmp_path: Path, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes = [{"error": "No module named 'torch'"}, TORCH, {}, {"error": "OSError: broken"}]
    monkeypatch.setattr(steps, "probe", lambda python: probes.pop(0))
    env = FakeEnvironment(tmp_path)
    assert steps.install_torch(env, project) == TORCH
    assert env.commands[0].endswith(" ".join(["install", *project.torch_requirements]))
    with pytest.raises(SetupError, match="OSError: broken"):
        steps.install_torch(env, project)


def test_an_index_that_does_not_answer_is_an_error_with_advice(
    tmp_path: Path, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "probe", lambda python: {})
    with pytest.raises(SetupError, match="check the network"):
        steps.install_torch(FakeEnvironment(tmp_path, failing=("install",)), project)


@pytest.mark.usefixtures("_all_tools")
@pytest.mark.parametrize(
    ("lacking", "word"), [("git", "git"), ("cxx", "compiler"), ("headers", "headers")]
)
def test_what_detectron2_cannot_be_built_without(
    lacking: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert steps.detectron2_obstacle() is None
    if lacking == "git":
        monkeypatch.setattr(steps.shutil, "which", lambda name: None)
    elif lacking == "cxx":
        monkeypatch.setattr(toolchain, "find_cxx", lambda: None)
    else:
        monkeypatch.setattr(toolchain, "has_python_headers", lambda: False)
    gap = steps.detectron2_obstacle()
    assert gap is not None
    assert word in gap.why
    assert "install" in gap.remedy
    assert not gap.retry


@pytest.mark.usefixtures("_all_tools")
class TestDetectron2:
    def test_is_built_without_isolation_from_the_pinned_commit(
        self, tmp_path: Path, project: Project
    ) -> None:
        env = FakeEnvironment(tmp_path)
        env.answers = [None, COMMIT]
        assert steps.install_detectron2(env, project, TORCH) is None
        clone, build, packages = env.commands
        assert clone.startswith("git clone")
        for word in ("--no-build-isolation", "--no-cache-dir", f"{steps.DETECTRON2_URL}@{COMMIT}"):
            assert word in build
        assert "-c " in packages
        assert env.variables[1]["FORCE_CUDA"] == "0"  # there is no toolkit that fits

    def test_of_our_commit_or_of_the_interpreter_is_kept(
        self, tmp_path: Path, project: Project
    ) -> None:
        env = FakeEnvironment(tmp_path)
        env.answers = [COMMIT, "interpreter"]
        assert steps.install_detectron2(env, project, TORCH) is None
        assert steps.install_detectron2(env, project, TORCH) is None
        assert env.commands == []

    def test_of_another_commit_is_built_anew(self, tmp_path: Path, project: Project) -> None:
        env = FakeEnvironment(tmp_path)
        env.answers = ["f" * 40, COMMIT]
        assert steps.install_detectron2(env, project, TORCH) is None
        assert len(env.commands) == 3

    def test_without_its_repository_is_a_gap_and_tried_again(
        self, tmp_path: Path, project: Project
    ) -> None:
        env = FakeEnvironment(tmp_path, failing=("clone",))
        env.answers = [None]
        gap = steps.install_detectron2(env, project, TORCH)
        assert gap is not None
        assert gap.missing == "detectron2"
        assert gap.retry
        assert "the last line" in gap.why
        assert len(env.commands) == 1

    def test_a_failing_compiler_stops(self, tmp_path: Path, project: Project) -> None:
        env = FakeEnvironment(tmp_path, failing=("--no-build-isolation",))
        env.answers = [None]
        with pytest.raises(SetupError, match="could not be built"):
            steps.install_detectron2(env, project, TORCH)

    def test_that_does_not_import_stops(self, tmp_path: Path, project: Project) -> None:
        env = FakeEnvironment(tmp_path)
        env.answers = [None, None]
        with pytest.raises(SetupError, match="cannot be imported"):
            steps.install_detectron2(env, project, TORCH)


@pytest.mark.usefixtures("_all_tools")
class TestKernels:
    @pytest.fixture(autouse=True)
    def _sources(self, tmp_path: Path) -> None:
        (tmp_path / "csrc" / "cuda").mkdir(parents=True)
        (tmp_path / "csrc" / "library.cpp").touch()
        (tmp_path / "csrc" / "cuda" / "op.cu").touch()

    def test_a_failing_compiler_stops(self, tmp_path: Path, project: Project) -> None:
        env = FakeEnvironment(tmp_path, failing=("-e",))
        with pytest.raises(SetupError, match="could not be built"):
            steps.install_d2det(env, project, TORCH)

    def test_without_a_compiler_are_a_gap(
        self, tmp_path: Path, project: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(toolchain, "find_cxx", lambda: None)
        gap = steps.install_d2det(FakeEnvironment(tmp_path), project, TORCH)
        assert gap is not None
        assert "compiler" in gap.why
        assert "reference" in gap.works

    def test_without_nvcc_are_a_gap_only_beside_a_gpu(
        self, tmp_path: Path, project: Project, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert steps.install_d2det(FakeEnvironment(tmp_path), project, TORCH) is None
        assert "CPU kernels only: no nvcc" in capsys.readouterr().out
        gap = steps.install_d2det(FakeEnvironment(tmp_path), project, TORCH | {"gpu": True})
        assert gap is not None
        assert gap.missing == "d2det's CUDA kernels"

    def test_for_cuda_are_left_out_where_no_gpu_would_run_them(
        self,
        tmp_path: Path,
        project: Project,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(toolchain, "find_cuda_toolkit", lambda cuda: (tmp_path, ""))
        monkeypatch.delenv("FORCE_CUDA", raising=False)
        env = FakeEnvironment(tmp_path)
        assert steps.install_d2det(env, project, TORCH) is None
        assert env.variables == [{"FORCE_CUDA": "0"}]
        assert "no GPU here (FORCE_CUDA=1" in capsys.readouterr().out
        steps.install_d2det(env, project, TORCH | {"gpu": True})
        monkeypatch.setenv("FORCE_CUDA", "1")
        steps.install_d2det(env, project, TORCH)
        assert env.variables[1:] == [{}, {}]


def test_reason_prefers_the_compilers_errors_to_the_end() -> None:
    noise = [f"  File line {i}" for i in range(40)]
    output = "\n".join(["g++ -c op.cpp", "op.cpp:3:5: error: expected ';'", *noise])
    assert Result(False, output).reason().strip() == "op.cpp:3:5: error: expected ';'"
    assert Result(False, "\n".join(noise)).reason(2).split("\n")[-1].strip() == "File line 39"


def test_packages_of_a_virtual_environment_are_seen_from_the_new_one(tmp_path: Path) -> None:
    packages = tmp_path / "it's there"
    packages.mkdir()
    (packages / "brought_along.py").write_text("value = 7\n")
    env = Environment(tmp_path / "new")
    env.create(sys.executable, {"in_venv": True, "site_packages": [str(packages)]})
    code = "import brought_along, sys; print(brought_along.value, sys.prefix)"
    assert env.ask(code) == f"7 {tmp_path / 'new'}"
    assert env.is_usable()


def test_an_interpreter_without_venv_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, stdout="ensurepip is not available")

    monkeypatch.setattr(environment.subprocess, "run", fail)
    with pytest.raises(SetupError, match="python3-venv"):
        Environment(tmp_path / "new").create(sys.executable, None)


class TestMain:
    """The program as a whole, in a project folder of its own, with the steps counted."""

    GAP = Gap("detectron2", "there is no git", "the operators", "install git")

    @pytest.fixture(autouse=True)
    def _project(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "d2det").mkdir()
        for name in ("pyproject.toml", "d2det/__init__.py"):
            (tmp_path / name).write_text((ROOT / name).read_text())
        self.root = tmp_path
        self.calls: list[bool] = []
        self.gaps: list[Gap] = []
        monkeypatch.setattr(setup_env, "ROOT", tmp_path)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(setup_env, "set_up", self.set_up)

    def set_up(
        self, env: Environment, project: Project, interpreter: str, remake: bool
    ) -> dict[str, Any]:
        self.calls.append(remake)
        env.python.parent.mkdir(parents=True, exist_ok=True)
        env.python.touch()
        return {
            "fingerprint": setup_env.fingerprint(project),
            "interpreter": interpreter,
            "gaps": [gap._asdict() for gap in self.gaps],
            "installed": "all",
        }

    def test_runs_once_and_again_after_a_change(self) -> None:
        assert setup_env.main([]) == 0
        assert setup_env.main([]) == 0
        assert len(self.calls) == 1
        (self.root / "csrc").mkdir()
        (self.root / "csrc" / "new.cpp").touch()
        assert setup_env.main([]) == 0
        assert len(self.calls) == 2

    def test_a_gap_is_reported_every_time_and_fails_only_what_needs_it(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.gaps = [self.GAP]
        assert setup_env.main([]) == 0
        assert setup_env.main(["--require", "detectron2"]) == 1
        assert len(self.calls) == 1
        output = capsys.readouterr()
        assert output.out.count("Missing: detectron2, because there is no git.") == 2
        assert "This command needs detectron2" in output.err

    def test_a_network_gap_is_tried_again(self) -> None:
        self.gaps = [self.GAP._replace(retry=True)]
        setup_env.main([])
        self.gaps = []
        assert setup_env.main(["--require", "detectron2"]) == 0
        assert len(self.calls) == 2

    def test_another_interpreter_replaces_the_first_only_when_chosen(self) -> None:
        setup_env.main([])
        stamp = self.root / ".venv" / setup_env.STAMP
        stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"interpreter": "other"}))
        setup_env.main([])
        assert self.calls == [False]
        setup_env.main(["--interpreter-chosen"])
        assert self.calls == [False, True]

    def test_an_error_leaves_no_stamp_and_a_status(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        setup_env.main([])

        def fail(*arguments: Any) -> None:
            raise SetupError("the compiler failed")

        monkeypatch.setattr(setup_env, "set_up", fail)
        (self.root / "setup.py").touch()
        assert setup_env.main([]) == 1
        assert "the compiler failed" in capsys.readouterr().err
        assert not (self.root / ".venv" / setup_env.STAMP).exists()

"""Names, models, weights by path or address, and the entry points of torch.hub."""

from __future__ import annotations

import functools
import hashlib
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest
import torch

from d2det import model_zoo
from d2det.model_zoo.weights import Weights, fetch, pretrained

ROOT = Path(__file__).parents[2]
OTHER = "0" * 64


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def site(tmp_path) -> Iterator[tuple[str, Path]]:
    """The address of a server in this process, and its folder."""
    folder = tmp_path / "site"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=str(folder))
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def test_a_download_is_checked_and_kept(site, cache):
    url, folder = site
    sha256 = write(folder / "model.pth", b"weights")
    path = fetch(f"{url}/model.pth", sha256.upper())
    assert Path(path) == cache / f"model-{sha256[:8]}.pth"
    assert Path(path).read_bytes() == b"weights"
    (folder / "model.pth").unlink()
    assert fetch(f"{url}/model.pth", sha256) == path  # not downloaded again


def test_a_wrong_download_is_an_error_and_not_kept(site, cache):
    url, folder = site
    found = write(folder / "model.pth", b"weights")
    cache.mkdir(parents=True)
    (cache / "model.pth").write_bytes(b"the user's")
    with pytest.raises(ValueError, match=f"(?s)model.pth has sha256 {found}, not {OTHER}"):
        fetch(f"{url}/model.pth", OTHER)
    assert [p.name for p in cache.iterdir()] == ["model.pth"]
    assert (cache / "model.pth").read_bytes() == b"the user's"


def test_a_damaged_file_in_the_cache_is_named_and_left(site, cache):
    url, folder = site
    sha256 = write(folder / "model.pth", b"weights")
    path = Path(fetch(f"{url}/model.pth", sha256))
    path.write_bytes(b"wei")
    with pytest.raises(ValueError, match="Delete it"):
        fetch(f"{url}/model.pth", sha256)
    assert path.read_bytes() == b"wei"


def test_files_and_unfit_sources(site, cache, tmp_path):
    url, _ = site
    file = tmp_path / "own.pth"
    sha256 = write(file, b"own")
    assert fetch(file) == fetch(file, sha256) == str(file)
    with pytest.raises(ValueError, match=r"own.pth has sha256"):
        fetch(file, OTHER)
    assert file.read_bytes() == b"own"
    with pytest.raises(FileNotFoundError, match=r"none.pth do not exist"):
        fetch(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="give the file's sha256"):
        fetch(f"{url}/model.pth")
    with pytest.raises(ValueError, match="64 hexadecimal"):
        fetch(f"{url}/model.pth", "abc")
    with pytest.raises(RuntimeError, match="cannot be downloaded"):
        fetch(f"{url}/absent.pth", OTHER)
    assert not list(cache.iterdir())
    assert fetch("detectron2://x/model.pkl") == "detectron2://x/model.pkl"
    with pytest.raises(ValueError, match="sha256 is for"):
        fetch("detectron2://x/model.pkl", OTHER)


def test_pretrained_weights_say_what_there_is(monkeypatch):
    with pytest.raises(LookupError, match="publishes no pretrained weights of quickstart"):
        pretrained("quickstart")
    entry = Weights("https://example.org/a.pth", OTHER)
    monkeypatch.setattr("d2det.model_zoo.weights.WEIGHTS", {"quickstart": entry})
    assert pretrained("quickstart") is entry
    with pytest.raises(LookupError, match="only of quickstart"):
        pretrained("quickstart_masks")


def test_published_weights_belong_to_configs():
    for name, entry in model_zoo.WEIGHTS.items():
        assert name in model_zoo.names()
        assert entry.url.startswith("https://")
        assert len(bytes.fromhex(entry.sha256)) == 32


def test_names():
    names = model_zoo.names()
    assert {"quickstart", "COCO-Detection/d2det_R_50_FPN_2x"} <= set(names)
    assert names == sorted(set(names))
    assert not [name for name in names if "Base-" in name]


def test_without_detectron2_names_are_known_and_the_rest_says_why():
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('detectron2', 'fvcore', 'omegaconf', 'yaml'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "import importlib.util as util\n"
        "found = util.find_spec\n"
        "util.find_spec = lambda n, *a: None if n == 'detectron2' else found(n, *a)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import d2det\n"
        "assert 'quickstart' in d2det.model_zoo.names()\n"
        "for call in (d2det.model_zoo.get, d2det.model_zoo.get_lazy_config):\n"
        "    try: call('quickstart')\n"
        "    except ImportError as error: assert 'needs detectron2' in str(error), error\n"
        "    else: raise AssertionError\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_hub_without_detectron2():
    model = torch.hub.load(
        str(ROOT), "d2det_quickstart", source="local", num_classes=4, trust_repo=True
    )
    model.eval()
    with torch.no_grad():
        (output,) = model([torch.rand(3, 64, 80)])
    assert {"boxes", "labels", "scores"} <= set(output)
    contents = runpy.run_path(str(ROOT / "hubconf.py"))
    # As torch.hub.list looks for them, which knows no local source.
    listed = {n for n, value in contents.items() if callable(value) and not n.startswith("_")}
    assert listed == {
        "d2det",
        "d2det_quickstart",
        "d2det_resnet50_fpn",
        "d2det_resnet101_fpn",
        "d2det_resnet50_dcnv2_fpn",
        "d2det_resnet101_dcnv2_fpn",
    }


class TestWithDetectron2:
    @pytest.fixture(autouse=True)
    def _needs(self):
        pytest.importorskip("detectron2")

    def test_config_is_get_cfg(self):
        import d2det

        assert model_zoo.get_config("quickstart") == d2det.get_cfg("quickstart")
        with pytest.raises(FileNotFoundError, match="did you mean quickstart"):
            model_zoo.get("quickstrat")

    def test_weights_by_path_and_address(self, site, cache):
        url, folder = site
        first = model_zoo.get("quickstart", device="cpu")
        assert not first.training
        torch.save({"model": first.state_dict()}, folder / "model.pth")
        sha256 = hashlib.sha256((folder / "model.pth").read_bytes()).hexdigest()
        for source, given in ((folder / "model.pth", None), (f"{url}/model.pth", sha256)):
            torch.manual_seed(7)
            other = model_zoo.get("quickstart", source, "cpu", sha256=given)
            expected = first.state_dict()
            assert other.state_dict().keys() == expected.keys()
            assert all(torch.equal(v, expected[k]) for k, v in other.state_dict().items())
        with pytest.raises(ValueError, match="do not hold the whole model"):
            model_zoo.get(
                "quickstart",
                folder / "model.pth",
                overrides=["MODEL.ROI_HEADS.NUM_CLASSES", 3],
            )

    def test_unfit_arguments(self):
        with pytest.raises(LookupError, match="publishes no pretrained weights of quickstart "):
            model_zoo.get("configs/quickstart.yaml", "pretrained")
        with pytest.raises(ValueError, match="sha256 is given without weights"):
            model_zoo.get("quickstart", sha256=OTHER)
        with pytest.raises(FileNotFoundError, match=r"none.pth"):
            model_zoo.get("quickstart", "none.pth")
        with pytest.raises(ValueError, match="unknown config key MODEL.NUM"):
            model_zoo.get("quickstart", overrides=["MODEL.NUM", 1])

    def test_hub(self):
        model = torch.hub.load(
            str(ROOT),
            "d2det",
            "quickstart",
            source="local",
            device="cpu",
            overrides=["MODEL.ROI_HEADS.NUM_CLASSES", 2],
        )
        assert type(model).__name__ == "GeneralizedRCNN"
        assert model.roi_heads.num_classes == 2

"""The compiled RoI operators with kernels of lesser instruction sets than this processor's best.

The best one is what all other tests run with.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from d2det.ops import _library

pytestmark = pytest.mark.skipif(
    _library.implementation("deform_roi_pool", "cpu") != "compiled",
    reason="no compiled kernels for the CPU here",
)

# In a process of its own, since the choice is made once.
_SCRIPT = """
import torch
import test_ops_adaptive_weighted_pool_compiled as weighted
import test_ops_deform_roi_pool_compiled as roi
import test_ops_soft_nms_compiled as nms
torch.set_num_threads(1)
for dtype in roi.DTYPES:
    for channels, layouts in ((37, (True, False, True)), (64, (True, True, False))):
        roi.check(roi.make(9, channels, 4, layouts), dtype)
    roi.check(roi.make(9, 17, 4, moved=False), dtype, ratio=3, convention="psroi")
    for layouts in ((False, True), (True, True)):
        tensors = weighted.make((2, 37, 14, 14), (7, 7), layouts)
        weighted.check(tensors, (12.0, 3, 2, 1, True), (dtype,) * 3)
        weighted.check(tensors, (12.0, 3, 2, 1, False), (dtype,) * 3)
    weighted.check(weighted.make((1, 5, 6, 9), (5, 8)), (-3.0, 2, 1, 0, True), (dtype,) * 3)
weighted.test_sigmoid_and_exponential_are_precise()
for method in nms.METHODS:
    for count, classes in ((37, 1), (200, 3)):
        boxes, scores, labels = nms.make(count, classes)
        nms.check((boxes, scores, labels), method)
        nms.check((boxes.float(), scores.float(), labels), method)
print("done")
"""


@pytest.mark.parametrize("capability", ["portable", "avx2", "avx512"])
def test_every_instruction_set(capability):
    here = Path(__file__).parent
    paths = [str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "D2DET_CPU_CAPABILITY": capability,
        "PYTHONPATH": os.pathsep.join(paths),
    }
    result = subprocess.run(
        [sys.executable, "-c", _SCRIPT], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "done" in result.stdout

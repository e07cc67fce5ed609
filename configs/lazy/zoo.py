"""Any yaml config of the project as a LazyConfig; the environment variable D2DET_CONFIG names it.

    D2DET_CONFIG=COCO-Detection/d2det_R_50_FPN_2x \
        tools/lazyconfig_train_net.py --config-file configs/lazy/zoo.py optimizer.lr=0.01

The script is detectron2's. For a config file of one's own, put the name in place of the variable.
"""

import os

from d2det import model_zoo

_name = os.environ.get("D2DET_CONFIG")
if not _name:
    raise ValueError(
        "configs/lazy/zoo.py: set the environment variable D2DET_CONFIG to the name of a config, "
        f"one of {', '.join(model_zoo.names())}"
    )
_cfg = model_zoo.get_lazy_config(_name)

model = _cfg.model
dataloader = _cfg.dataloader
optimizer = _cfg.optimizer
lr_multiplier = _cfg.lr_multiplier
train = _cfg.train

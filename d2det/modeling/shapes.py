"""What the RoI branches need to know of the feature maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from detectron2.layers import ShapeSpec


def channels_and_strides(
    input_shape: Mapping[str, ShapeSpec], names: Sequence[str]
) -> tuple[int, tuple[int, ...]]:
    """The common channel count of the named features and their strides.

    Raises:
        ValueError: a name that the backbone does not give, or unlike channel counts.
    """
    missing = [name for name in names if name not in input_shape]
    if missing:
        raise ValueError(
            f"MODEL.ROI_HEADS.IN_FEATURES names {missing}, but the backbone gives "
            f"{sorted(input_shape)}"
        )
    channels = {name: input_shape[name].channels for name in names}
    if len(set(channels.values())) != 1:
        raise ValueError(
            f"the features of MODEL.ROI_HEADS.IN_FEATURES differ in channels: {channels}; "
            "D2Det's heads are shared by all levels (an FPN gives all levels the same width)"
        )
    return channels[names[0]], tuple(input_shape[name].stride for name in names)

# ConvNeXt-Tiny: layer scale starts at 1; the learning rate is lower towards the stem, in 6 groups of layers.
_base_ = "schedule_1x.py"

from detection import feature_channels

backbone = dict(
    name="convnext_tiny",
    out_indices=(0, 1, 2, 3),
    out_norm=True,
    drop_path=0.4,
    kwargs=dict(ls_init_value=1.0),
)
neck = dict(in_channels=feature_channels("convnext_tiny", (0, 1, 2, 3)))
param_scheduler = [
    _base_.param_scheduler[0],
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[9, 11], gamma=0.1),
]
optim_wrapper = dict(
    constructor="ConvNeXtLayerDecay",
    paramwise_cfg=dict(_delete_=True, decay_rate=0.95, num_layers=6),
)

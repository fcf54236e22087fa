# DeiT-Tiny: a simple feature pyramid from its one map (1/16). Our choice: the paper has no such row.
_base_ = "schedule_1x.py"

from detection import feature_channels

backbone = dict(
    name="deit_tiny_patch16_224",
    out_indices=(11,),
    out_norm=True,
    drop_path=0.1,
    kwargs=dict(dynamic_img_size=True, dynamic_img_pad=True),  # position embeddings are resampled for each size
)
neck = dict(
    type="SimplePyramid", out_channels=256, num_outs=5, in_channels=feature_channels("deit_tiny_patch16_224", (11,))
)

# ResNet50: stem and first stage frozen, all batch norms with the statistics of the checkpoint.
_base_ = "schedule_1x.py"

from detection import feature_channels

backbone = dict(name="resnet50", out_indices=(1, 2, 3, 4), frozen_stages=1, norm_eval=True)
neck = dict(in_channels=feature_channels("resnet50", (1, 2, 3, 4)))

# ResNet18, set as ResNet50 is.
_base_ = "schedule_1x.py"

from detection import feature_channels

backbone = dict(name="resnet18", out_indices=(1, 2, 3, 4), frozen_stages=1, norm_eval=True)
neck = dict(in_channels=feature_channels("resnet18", (1, 2, 3, 4)))

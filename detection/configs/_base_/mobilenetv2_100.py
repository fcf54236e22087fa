# MobileNetV2: maps of 24, 32, 96 and 1,280 channels. The last is the output of the last convolution.
_base_ = "schedule_1x.py"

from detection import feature_channels

backbone = dict(name="mobilenetv2_100", out_indices=(1, 2, 3, 5), frozen_stages=1, norm_eval=True)
neck = dict(in_channels=feature_channels("mobilenetv2_100", (1, 2, 3, 5)))

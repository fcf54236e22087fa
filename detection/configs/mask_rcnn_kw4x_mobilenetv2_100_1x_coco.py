# python -m detection config=mask_rcnn_kw4x_mobilenetv2_100_1x_coco data.root=PATH
# Published: box AP 38.0, mask AP 34.9.
_base_ = ["_base_/mask_rcnn.py", "_base_/mobilenetv2_100.py"]
model = dict(backbone=dict(n="4", **_base_.backbone), neck=_base_.neck)

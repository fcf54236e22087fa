# python -m detection config=mask_rcnn_mobilenetv2_100_1x_coco data.root=PATH
# Published: box AP 33.8, mask AP 31.7.
_base_ = ["_base_/mask_rcnn.py", "_base_/mobilenetv2_100.py"]
model = dict(backbone=dict(n="static", **_base_.backbone), neck=_base_.neck)

# python -m detection config=faster_rcnn_mobilenetv2_100_1x_coco data.root=PATH
_base_ = ["_base_/faster_rcnn.py", "_base_/mobilenetv2_100.py"]
model = dict(backbone=dict(n="static", **_base_.backbone), neck=_base_.neck)

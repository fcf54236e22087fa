# python -m detection config=faster_rcnn_kw4x_resnet50_1x_coco data.root=PATH
_base_ = ["_base_/faster_rcnn.py", "_base_/resnet50.py"]
model = dict(backbone=dict(n="4", **_base_.backbone), neck=_base_.neck)

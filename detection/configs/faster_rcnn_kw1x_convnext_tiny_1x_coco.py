# python -m detection config=faster_rcnn_kw1x_convnext_tiny_1x_coco data.root=PATH
_base_ = ["_base_/faster_rcnn.py", "_base_/convnext_tiny.py"]
model = dict(backbone=dict(n="1", **_base_.backbone), neck=_base_.neck)

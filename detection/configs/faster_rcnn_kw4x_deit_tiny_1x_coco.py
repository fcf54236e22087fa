# python -m detection config=faster_rcnn_kw4x_deit_tiny_1x_coco data.root=PATH
_base_ = ["_base_/faster_rcnn.py", "_base_/deit_tiny.py"]
model = dict(backbone=dict(n="4", **_base_.backbone), neck=dict(_delete_=True, **_base_.neck))

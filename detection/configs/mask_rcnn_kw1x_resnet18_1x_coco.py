# python -m detection config=mask_rcnn_kw1x_resnet18_1x_coco data.root=PATH
_base_ = ["_base_/mask_rcnn.py", "_base_/resnet18.py"]
model = dict(backbone=dict(n="1", **_base_.backbone), neck=_base_.neck)

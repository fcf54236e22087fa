# python -m detection config=mask_rcnn_kw4x_resnet50_1x_coco data.root=PATH
# Published: box AP 42.4, mask AP 38.9.
_base_ = ["_base_/mask_rcnn.py", "_base_/resnet50.py"]
model = dict(backbone=dict(n="4", **_base_.backbone), neck=_base_.neck)

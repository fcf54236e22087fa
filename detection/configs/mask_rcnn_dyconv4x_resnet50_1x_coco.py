# python -m detection config=mask_rcnn_dyconv4x_resnet50_1x_coco data.root=PATH
# Published: box AP 39.6, mask AP 36.6.
_base_ = ["_base_/mask_rcnn.py", "_base_/resnet50.py"]
model = dict(backbone=dict(dynamic="dyconv", n="4", **_base_.backbone), neck=_base_.neck)

# python -m detection config=mask_rcnn_resnet50_1x_coco data.root=PATH
# Published: box AP 39.6, mask AP 36.4.
_base_ = ["_base_/mask_rcnn.py", "_base_/resnet50.py"]
model = dict(backbone=dict(n="static", **_base_.backbone), neck=_base_.neck)

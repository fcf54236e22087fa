# python -m detection config=mask_rcnn_convnext_tiny_1x_coco data.root=PATH
# Published: box AP 43.4, mask AP 39.7.
_base_ = ["_base_/mask_rcnn.py", "_base_/convnext_tiny.py"]
model = dict(backbone=dict(n="static", **_base_.backbone), neck=_base_.neck)

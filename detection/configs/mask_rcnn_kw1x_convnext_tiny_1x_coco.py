# python -m detection config=mask_rcnn_kw1x_convnext_tiny_1x_coco data.root=PATH
# Published: box AP 44.7, mask AP 40.6.
_base_ = ["_base_/mask_rcnn.py", "_base_/convnext_tiny.py"]
model = dict(backbone=dict(n="1", **_base_.backbone), neck=_base_.neck)

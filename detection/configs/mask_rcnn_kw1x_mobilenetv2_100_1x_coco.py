# python -m detection config=mask_rcnn_kw1x_mobilenetv2_100_1x_coco data.root=PATH
# Published: box AP 36.4, mask AP 33.7.
_base_ = ["_base_/mask_rcnn.py", "_base_/mobilenetv2_100.py"]
model = dict(backbone=dict(n="1", **_base_.backbone), neck=_base_.neck)

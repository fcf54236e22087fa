# python -m detection config=mask_rcnn_fdconv_resnet50_1x_coco data.root=PATH
# Published: box AP 42.4, mask AP 38.6.
# FDConv's own steps, padding and batch. Its release trains in float16: optim_wrapper.type=AmpOptimWrapper, on a GPU.
_base_ = ["_base_/mask_rcnn.py", "_base_/resnet50.py"]
model = dict(
    data_preprocessor=dict(pad_size_divisor=64),
    backbone=dict(dynamic="fdconv", n="1", **_base_.backbone),
    neck=_base_.neck,
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[10, 11], gamma=0.1),
]
train_dataloader = dict(batch_size=4)

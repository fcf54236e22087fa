# make demo-detection: a small Mask R-CNN on real digits (scripts/data/digits_coco.py), for two CPU cores. Its backbone
# is that of `python -m train`'s default run, whose checkpoint it begins from: init=runs/digits/resnet_digits_kw1x/...
_base_ = ["_base_/mask_rcnn.py", "_base_/schedule_1x.py"]

from detection import feature_channels

classes = tuple("0123456789")
backbone = dict(
    name="resnet18",
    out_indices=(1, 2, 3, 4),
    kwargs=dict(layers=[1, 1, 1, 1], channels=[64, 64, 64, 128], stem_width=64),
)
roi = dict(out_channels=64)
model = dict(
    backbone=dict(n="1", **backbone),
    neck=dict(in_channels=feature_channels("resnet18", (1, 2, 3, 4), backbone["kwargs"]), out_channels=64),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=roi,
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=len(classes)),
        mask_roi_extractor=roi,
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64, num_classes=len(classes)),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100), rcnn=dict(max_per_img=20)),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(128, 128), keep_ratio=True),
    _base_.test_pipeline[2],
    _base_.test_pipeline[3],
]
digits = dict(data_root="data/digits", metainfo=dict(classes=classes))
train_dataloader = dict(
    batch_size=8, num_workers=0, persistent_workers=False, dataset=dict(pipeline=train_pipeline, **digits)
)
val_dataloader = dict(
    batch_size=8, num_workers=0, persistent_workers=False, dataset=dict(pipeline=test_pipeline, **digits)
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file="data/digits/annotations/instances_val2017.json")
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=6, val_interval=2)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=50),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=6, milestones=[5], gamma=0.1),
]
optim_wrapper = dict(optimizer=dict(lr=1e-3))

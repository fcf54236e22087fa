# Mask R-CNN with FPN on COCO, for any backbone: detector, data and runtime. A configuration adds a backbone's file.
_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "mmdet::_base_/default_runtime.py",
]
# torchvision's operators, where mmcv has no compiled ones; first, as MMDetection's models look for them on import.
custom_imports = dict(imports=["detection.torchvision_ops", "detection"], allow_failed_imports=False)

model = dict(backbone=dict(_delete_=True, type="KWBackbone"))

# Multi-scale, as in DETR: resize to one of eleven sizes; or to one of three, crop, then resize to one of the eleven.
sizes = [(short, 1333) for short in range(480, 801, 32)]
resize = dict(type="RandomChoiceResize", scales=sizes, keep_ratio=True)
crop = [
    dict(type="RandomChoiceResize", scales=[(400, 1333), (500, 1333), (600, 1333)], keep_ratio=True),
    dict(type="RandomCrop", crop_type="absolute_range", crop_size=(384, 600), allow_negative_crop=True),
    resize,
]
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomChoice", transforms=[[resize], crop]),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2, save_best="auto"))
auto_scale_lr = dict(enable=False, base_batch_size=16)  # the learning rate is for 16 images a step, summed over devices

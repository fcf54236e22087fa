"""The entry of model folders in timm's registry, under "kernelwarehouse": `timm.create_model("local-dir:FOLDER")` and
"hf-hub:USER/NAME" find it after `import kw`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models import load_pretrained, register_model, resolve_pretrained_cfg
from torch import nn

from kw.backbones import BACKBONES, Backbone
from kw.backbones.build import FEATURE_OPTIONS
from kw.description import KEYS, NAME, build
from kw.folder import CONFIG, read


@register_model
def kernelwarehouse(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    features_only: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """The entry in timm's registry: the model of a folder's description, which timm passes as keywords. Others, such as
    `num_classes`, override the static model's arguments.

    Raises:
        FolderError: the folder's config.json is not one that this version reads.
    """
    _check(pretrained_cfg, cache_dir)
    description = {key: kwargs.pop(key) for key in KEYS if key in kwargs}
    kwargs.pop("pretrained_model_args", None)
    features: dict[str, Any] = {key: kwargs.pop(key) for key in FEATURE_OPTIONS if key in kwargs}
    args = {**description.get("args", {}), **kwargs}
    model: Any = build({**description, "args": args})
    cfg: dict[str, Any] = resolve_pretrained_cfg(NAME, pretrained_cfg, pretrained_cfg_overlay).to_dict()  # type: ignore[no-untyped-call]
    model.pretrained_cfg = {**cfg, "architecture": description["base"]}
    if pretrained:
        load_pretrained(model, cfg, model.num_classes, args.get("in_chans", 3), cache_dir=cache_dir)
    base = description["base"]
    return BACKBONES.get(base, Backbone(base)).features_of(model, features) if features_only else model


def _check(cfg: Any, cache_dir: Any) -> None:
    """Check config.json, which timm has read by itself, as `kw.load` does.

    Raises:
        FolderError: it is of a later version, damaged, or has keys that are not known.
    """
    source = cfg.get("source") if isinstance(cfg, Mapping) else None
    if source == "local-dir":
        read(cfg["file"])
    elif source == "hf-hub":
        from huggingface_hub import hf_hub_download  # timm has loaded the file with it, into its cache

        name, _, revision = cfg["hf_hub_id"].partition("@")
        path = hf_hub_download(name, CONFIG, revision=revision or None, cache_dir=cache_dir, local_files_only=True)
        read(Path(path).parent)

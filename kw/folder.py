"""A model folder: what is needed to use a trained model, and to upload it to the Hub.

    model.safetensors   the state dict; cells that layers share are in it once
    config.json         what the model is (kw/description.py), how images are prepared, its classes, where it is from
    README.md           a model card (kw/card.py)

The layout is timm's: with `import kw`, `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it too, and
"hf-hub:USER/NAME" once it is uploaded. Nothing in a folder is run: both files hold plain values and numbers.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.data import resolve_data_config
from torch import Tensor, nn

from kw.card import card
from kw.contents import DATA, Contents
from kw.description import NAME, build, describe
from kw.frozen import refuse_frozen
from kw.temperature import temperatures

FORMAT = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
OURS = ("format", "kw", "temperature", "figures", "provenance")  # keys of config.json's part of that name
TIMMS = ("architecture", "num_classes", "label_names", "pretrained_cfg", "model_args", NAME)  # of config.json
MORE = ("first_conv", "classifier", "pool_size", "fixed_input_size")  # of pretrained_cfg, besides `DATA`
CLOSE = 1e-4  # of the largest output: a saved model must compute what the original does


class FolderError(ValueError):
    """A model folder cannot be read or written; the message names file and remedy, in one line."""


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    classes: Sequence[str] | None = None,
    data: Mapping[str, Any] | None = None,
    figures: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    args: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model folder, and return it. The folder is read again first: what it loads as must compute the same.

    Args:
        model: a classifier, dynamic or static. If timm did not build the static one, `load` needs it as `model=`.
        folder: is made; files of an earlier `save` in it are replaced.
        classes: names of the classes, in the order of the outputs.
        data: how images are prepared, by timm's names `DATA`; by default as `timm.data` says of the model.
        figures, provenance: for the model card and config.json, by name: plain values.
        args: timm's keyword arguments of the static model, where those that timm and `kw.create_model` keep are not
            plain values.

    Raises:
        FolderError: the model cannot be described in plain values, would load as another one, or cannot be written.
        ValueError: the model is frozen: save the original, and freeze what is loaded.
    """
    refuse_frozen(model, "is not what a folder keeps")
    folder = Path(folder).expanduser()
    contents = _contents(model, folder, classes, data, figures, provenance, args)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    try:
        _refuse_others(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            save_file(weights, made / WEIGHTS, metadata={"format": "pt"})
            (made / CONFIG).write_text(json.dumps(_to_json(contents), indent=1) + "\n", encoding="utf-8")
            (made / CARD).write_text(card(contents, weights), encoding="utf-8")
            if contents.description["base"] is not None:
                _check_same(model, load(made), contents, folder)
            folder.mkdir(exist_ok=True)
            for name in (WEIGHTS, CONFIG, CARD):
                os.chmod(made / name, 0o644)
                os.replace(made / name, folder / name)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        where = f" ({error.filename})" if error.filename and Path(error.filename) != folder else ""
        raise FolderError(f"{folder} could not be written: {error.strerror or error}{where}.") from error
    return folder


def load(folder: str | Path, *, model: nn.Module | None = None) -> nn.Module:
    """The model of a folder, on the CPU, in evaluation mode. No code of the folder is run.

    `model.pretrained_cfg` says as in timm how images are prepared, and has the names of the classes, if known:

    >>> transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    >>> classes = model.pretrained_cfg["label_names"]

    Args:
        model: the static model, newly built, where it is not one of timm's. It is changed in place.

    Raises:
        FolderError: a file is missing, damaged, of another kind or of a later version, or weights do not fit.
    """
    folder = Path(folder).expanduser()
    contents = read(folder)
    weights = _weights(folder)
    try:
        built: Any = build(contents.description, model)
    except (ValueError, KeyError, TypeError) as error:
        raise FolderError(f"{folder / CONFIG}: the model cannot be built: {str(error).removesuffix('.')}.") from error
    if getattr(built, "num_classes", contents.num_classes) != contents.num_classes:
        counts = f"num_classes is {contents.num_classes}, and the model has {built.num_classes}"
        raise FolderError(f"{folder / CONFIG} is damaged: {counts}. Export the model again.")
    _check_fits(built, weights, folder)
    dtypes = {value.dtype for value in weights.values() if value.is_floating_point() and value.dim()}
    if len(dtypes) == 1:
        built.to(dtypes.pop())
    built.load_state_dict(weights)
    cfg = {**contents.more, **contents.data, "num_classes": contents.num_classes, "label_names": contents.classes}
    built.pretrained_cfg = {"architecture": contents.description["base"], **cfg}
    return built.eval()  # type: ignore[no-any-return]


def read(folder: str | Path) -> Contents:
    """What a folder's config.json says, checked.

    Raises:
        FolderError: it is missing, damaged, of another kind or of a later version, or has keys that are not known.
    """
    folder = Path(folder).expanduser()
    path = folder / CONFIG
    if not path.is_file():
        raise FolderError(f"{folder} {_why_no_config(folder)}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise FolderError(f"{path} is damaged: {error}. Export the model again.") from None
    ours = found.get(NAME) if isinstance(found, dict) else None
    if not isinstance(ours, dict):
        kind = found.get("architecture") or found.get("model_type") if isinstance(found, dict) else None
        raise FolderError(
            f"{path} was not written by kw.save (it is of {kind!r}): load the folder with the library that wrote it, "
            f"such as timm.create_model('local-dir:{folder}', pretrained=True)."
        )
    if ours.get("format") != FORMAT:
        raise FolderError(
            f"{path} has format {ours.get('format')!r}, of kw {ours.get('kw')}; this version reads format {FORMAT}: "
            f"update kw."
        )
    unknown = [key for key in found if key not in TIMMS] + [f"{NAME}.{key}" for key in ours if key not in OURS]
    if unknown:
        raise FolderError(f"{path} has {unknown[0]!r}, which this version of kw does not know: update kw.")
    try:
        return _from_json(found)
    except (KeyError, TypeError, ValueError) as error:
        raise FolderError(f"{path} is damaged: {error!r}. Export the model again.") from None


def _contents(
    model: nn.Module,
    folder: Path,
    classes: Sequence[str] | None,
    data: Mapping[str, Any] | None,
    figures: Mapping[str, Any] | None,
    provenance: Mapping[str, Any] | None,
    args: Mapping[str, Any] | None,
) -> Contents:
    cfg = dict(getattr(model, "pretrained_cfg", None) or {})
    unknown = [key for key in data or {} if key not in DATA]
    if unknown:
        raise FolderError(f"data has {unknown[0]!r}; there are {', '.join(DATA)}.")
    timms: dict[str, Any] = resolve_data_config(pretrained_cfg=cfg or {"crop_pct": 0.875})  # type: ignore[no-untyped-call]
    try:
        description = describe(model, args)
        if classes is None and cfg.get("label_names"):
            classes = cfg["label_names"]
        number = getattr(model, "num_classes", None)
        number = len(classes or ()) if number is None else number
        if classes is not None and len(classes) != number:
            raise ValueError(f"{len(classes)} classes are named, and the model has {number}.")
    except ValueError as error:
        raise FolderError(f"{folder}: {error}") from error
    found = temperatures(model)
    return Contents(
        description=description,
        data={**{key: timms[key] for key in DATA}, **(data or {})},
        num_classes=int(number),
        classes=None if classes is None else tuple(classes),
        temperature=float(found[0]) if found else None,
        figures=dict(figures or {}),
        provenance=dict(provenance or {}),
        more={key: cfg[key] for key in MORE if key in cfg},
    )


def _to_json(contents: Contents) -> dict[str, Any]:
    from kw import __version__  # kw imports this module

    return {
        "architecture": NAME,
        "num_classes": contents.num_classes,
        **({} if contents.classes is None else {"label_names": list(contents.classes)}),
        "pretrained_cfg": {**contents.more, **contents.data, "num_classes": contents.num_classes},
        "model_args": dict(contents.description),
        NAME: {
            "format": FORMAT,
            "kw": __version__,
            "temperature": contents.temperature,
            "figures": dict(contents.figures),
            "provenance": dict(contents.provenance),
        },
    }


def _from_json(found: Mapping[str, Any]) -> Contents:
    cfg, ours, classes = dict(found["pretrained_cfg"]), found[NAME], found.get("label_names")
    cfg.pop("num_classes", None)
    data = {key: _tuples(cfg.pop(key)) for key in DATA}
    unknown = [key for key in cfg if key not in MORE]
    if unknown:
        raise ValueError(f"pretrained_cfg has {unknown[0]!r}, which this version of kw does not know")
    for key in ("input_size", "mean", "std"):
        numbers = isinstance(data[key], tuple) and all(isinstance(one, (int, float)) for one in data[key])
        if not numbers or (key == "input_size" and len(data[key]) != 3):
            raise ValueError(f"{key} is {data[key]!r}, not numbers")
    number = int(found["num_classes"])
    if classes is not None and not (isinstance(classes, list) and all(isinstance(one, str) for one in classes)):
        raise ValueError(f"label_names is {classes!r}, not a list of names")
    if classes is not None and len(classes) != number:
        raise ValueError(f"{len(classes)} classes are named, and the model has {number}")
    return Contents(
        description=dict(found["model_args"]),
        data=data,
        num_classes=number,
        classes=None if classes is None else tuple(map(str, classes)),
        temperature=ours["temperature"],
        figures=dict(ours["figures"]),
        provenance=dict(ours["provenance"]),
        more=cfg,
    )


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _why_no_config(folder: Path) -> str:
    if not folder.is_dir():
        return "is a file, not a model folder." if folder.exists() else "does not exist."
    if (folder / "checkpoints").is_dir():
        return f"is a run folder: python -m scripts.export checkpoint={folder} to=FOLDER makes a model folder of it."
    return f"has no {CONFIG}, so it is not a model folder: kw.save and python -m scripts.export write one."


def _weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        return load_file(path)
    except FileNotFoundError:
        raise FolderError(f"{path} does not exist: copy the complete folder, or export the model again.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise FolderError(
            f"{path} is damaged, cut off, or not a safetensors file ({error}): copy or export it again."
        ) from None


def _check_fits(model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    own = model.state_dict()
    wrong = [f"{name!r} is missing" for name in own.keys() - weights.keys()]
    wrong += [f"{name!r} is left over" for name in weights.keys() - own.keys()]
    wrong += [
        f"{name!r} has shape {tuple(weights[name].shape)}, not {tuple(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if own[name].shape != weights[name].shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise FolderError(
            f"{folder / WEIGHTS} does not fit the model of {CONFIG}: {'; '.join(sorted(wrong)[:3])}{more}. The two "
            f"files are of different models: export again."
        )


@torch.no_grad()
def _check_same(model: nn.Module, loaded: nn.Module, contents: Contents, folder: Path) -> None:
    """Whether the loaded model computes what the original does: shapes alone do not show a stride or an activation."""
    modes = {module: module.training for module in model.modules()}
    parameter = next(model.parameters())
    x = torch.linspace(-2, 2, 3 * 7919)[torch.randperm(3 * 7919, generator=torch.Generator().manual_seed(0))]
    size = contents.data["input_size"]
    x = x.repeat(-(-torch.Size(size).numel() // x.numel()))[: torch.Size(size).numel()].view(1, *size)
    try:
        expected = model.eval()(x.to(parameter)).cpu()
    except (RuntimeError, ValueError, AssertionError) as error:
        raise FolderError(
            f"{folder}: the model does not run on an image of input_size={tuple(size)}: {str(error).splitlines()[0]} "
            f"Pass data={{'input_size': (channels, height, width)}}."
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    found = loaded(x.to(parameter.dtype))
    tolerance = CLOSE if parameter.dtype in (torch.float32, torch.float64) else 5e-2
    if found.shape != expected.shape or (found - expected).abs().max() > tolerance * expected.abs().max():
        raise FolderError(
            f"{folder}: the model differs from what {contents.description['base']} is with "
            f"{dict(contents.description['args'])}, so that it would load as another one. If it was built with other "
            f"arguments, pass them as args=...; if it was changed afterwards, only its code can build it."
        )


def _refuse_others(folder: Path) -> None:
    """Raises FolderError if the folder has a config.json of something else."""
    if (folder / CONFIG).exists():
        try:
            read(folder)
        except FolderError as error:
            raise FolderError(f"{folder} has another {CONFIG} already; choose another folder. {error}") from None

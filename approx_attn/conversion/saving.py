"""Save a converted model to a folder and load it back, without pickle.

The folder holds the unconverted model (for Hugging Face models what `save_pretrained` writes, which is opened as it
was before conversion only where `attn_implementation=` asks for it), `approx_attn.json`, which says what stands
where, and `approx_attn.safetensors`, the parameters of the mechanisms. Loading runs classes of this package and of
transformers only.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from approx_attn.attention import AttentionMechanism, AttentionShape
from approx_attn.attention.multihead import MultiheadAttention
from approx_attn.conversion.feed_forward import converted_blocks, restore_blocks
from approx_attn.conversion.installing import find_layers, install
from approx_attn.conversion.layers import SLOT, AttentionLayer, AttentionSlot

SIZES = ("num_heads", "head_dim", "value_dim", "num_key_value_heads")  # what `shape` holds in the header

HEADER, TENSORS, TORCH_MODEL = "approx_attn.json", "approx_attn.safetensors", "model.safetensors"
FORMAT = 1


def save_converted(model: nn.Module, folder: str | Path, **options: Any) -> Path:
    """Write a converted model to a folder.

    Args:
        model: what `convert` returned, trained or not.
        folder: made if missing; files of the same names are replaced.
        options: of `save_pretrained`, for models of Hugging Face, such as `max_shard_size`; that method of a
            converted model calls this function.

    Returns:
        The folder.

    Raises:
        ValueError: nothing in the model is converted, or an option of a mechanism is not plain data.
    """
    folder = Path(folder)
    layers = {layer.name: layer for layer in find_layers(model)}
    slots = {name: slot for name, layer in layers.items() if (slot := _slot_of(layer)) is not None}
    if not slots:
        raise ValueError(
            f"{type(model).__name__} is not converted, so there is nothing to save beside the model itself."
        )
    header: dict[str, Any] = {
        "format": FORMAT,
        "library": "transformers" if _is_pretrained(model) else "torch",
        "model": type(model).__name__,
        "layers": {name: _layer_header(slot) for name, slot in slots.items()},
    }
    blocks = converted_blocks(model)
    if blocks:
        header["feed_forward"] = blocks
    try:
        text = json.dumps(header, indent=2)
    except TypeError as error:
        raise ValueError(f"an option of a mechanism is not plain data, so it cannot be saved: {error}.") from error
    tensors = {
        f"{name}.{key}": tensor.detach().clone().contiguous()
        for name, slot in slots.items()
        if slot.mechanism is not None
        for key, tensor in slot.mechanism.state_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    _save_unconverted(model, slots, folder, options)
    save_file(tensors, folder / TENSORS)
    (folder / HEADER).write_text(text + "\n")
    return folder


def load_converted(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load what `save_converted` wrote.

    Args:
        folder: its folder.
        model: for models that are not of transformers: a freshly built, unconverted model to load into.

    Returns:
        The converted model, in evaluation mode.

    Raises:
        ValueError: the folder or a file in it is missing, foreign or truncated, or `model` does not fit.
    """
    folder = Path(folder)
    header = _read_header(folder)
    if header["library"] == "transformers":
        if model is not None:
            raise ValueError(f"model= must be left out: {folder} says how to build its {header['model']}.")
        model = _load_pretrained(folder, header["model"])
    else:
        if model is None:
            raise ValueError(
                f"model= must be given: {folder} holds a {header['model']}, which only its own code builds."
            )
        if any(_slot_of(layer) is not None for layer in find_layers(model)):
            raise ValueError("model= must be unconverted.")
        try:
            model.load_state_dict(_read_tensors(folder / TORCH_MODEL))
        except RuntimeError as error:
            raise ValueError(f"{folder / TORCH_MODEL} does not fit model={type(model).__name__}: {error}") from error
    _install_saved(model, header, folder)
    return model.eval()


def mark_converted(model: nn.Module) -> None:
    """Let `save_pretrained` of the models of transformers in `model` save them as what they are, converted or not."""
    if "transformers" in sys.modules:  # no model of that library can be here before it was imported
        from approx_attn.conversion import huggingface

        huggingface.mark_converted(model, save_converted)


# -- layers and their headers ----------------------------------------------------------------------------


def _slot_of(layer: AttentionLayer) -> AttentionSlot | None:
    """The slot of a converted layer; one made up for a replaced multi-head layer; None if it is as it was."""
    if layer.host != "multihead":
        slot: AttentionSlot | None = getattr(layer.module, SLOT, None)
        return None if slot is None or slot.spec is None else slot
    if not isinstance(layer.module, MultiheadAttention) or layer.module.replaced is None:
        return None
    slot = AttentionSlot(layer.name, {"name": "exact"}, layer.shape)
    slot.spec, mechanism = layer.module.spec, layer.module.attention
    if mechanism.name != "exact":
        slot.mechanism = mechanism
        slot.options = {key: value for key, value in asdict(mechanism.shape).items() if key not in SIZES}
    return slot


def _layer_header(slot: AttentionSlot) -> dict[str, Any]:
    return {
        "attention": slot.spec,
        "shape": None if slot.shape is None else {key: asdict(slot.shape)[key] for key in SIZES},
        "options": slot.options,
    }


def _install_saved(model: nn.Module, header: dict[str, Any], folder: Path) -> None:
    layers = header["layers"]
    found = {layer.name: layer for layer in find_layers(model)}
    missing = sorted(set(layers) - set(found))
    if missing:
        raise ValueError(f"{folder / HEADER} names the layer {missing[0]}, which the model does not have.")
    slots = {}
    for name, entry in layers.items():
        shape = None if entry["shape"] is None else AttentionShape(**entry["shape"])
        spec = _without_files(entry["attention"])
        slots[name] = AttentionSlot(name, spec, shape, is_cross=found[name].is_cross, **entry["options"])
    mechanisms = [slot.mechanism for slot in slots.values() if slot.mechanism is not None]
    for mechanism in mechanisms[1:]:
        mechanism.tie_to(mechanisms[0])
    tensors = _read_tensors(folder / TENSORS)
    for name, slot in slots.items():
        own = {key.removeprefix(f"{name}."): tensors.pop(key) for key in list(tensors) if key.startswith(f"{name}.")}
        _load_mechanism(name, slot.mechanism, own, folder)
        slot.spec = dict(layers[name]["attention"])
    if tensors:
        raise ValueError(f"{folder / TENSORS} holds {next(iter(tensors))}, which no layer of {HEADER} has.")
    restore_blocks(model, header.get("feed_forward", {}))
    install(model, list(found.values()), slots)
    mark_converted(model)


def _without_files(spec: dict[str, Any]) -> dict[str, Any]:
    """The options without the basis file they started from: the saved parameters take its place."""
    spec = dict(spec)
    if spec.pop("basis", None) is not None and spec.get("basis_init") == "calibrated":
        del spec["basis_init"]
    return spec


def _load_mechanism(name: str, mechanism: AttentionMechanism | None, tensors: dict[str, Tensor], folder: Path) -> None:
    if mechanism is None:
        return
    try:
        mechanism.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{folder / TENSORS} does not fit attention={mechanism.name} of layer {name}: {error}"
        ) from error
    dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), None)
    mechanism.to(dtype=dtype)


# -- files -----------------------------------------------------------------------------------------------


def _is_pretrained(model: nn.Module) -> bool:
    """Is this a model of transformers, which its `from_pretrained` can build again?"""
    transformers = sys.modules.get("transformers")
    return transformers is not None and getattr(transformers, type(model).__name__, None) is type(model)


def _save_unconverted(model: Any, slots: dict[str, AttentionSlot], folder: Path, options: dict[str, Any]) -> None:
    """Save the model without the parameters of its mechanisms."""
    mechanisms = tuple(f"{name}.{part}." for name in slots for part in (SLOT, "attention"))
    state = options.pop("state_dict", None) or model.state_dict()
    tensors = {key: tensor for key, tensor in state.items() if not key.startswith(mechanisms)}
    if _is_pretrained(model):
        type(model).save_pretrained(model, folder, state_dict=tensors, **options)
    else:
        save_file({key: t.detach().clone().contiguous() for key, t in tensors.items()}, folder / TORCH_MODEL)


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / HEADER
    try:
        header = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{folder} is not a folder that save_converted wrote: {HEADER} cannot be read.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: it is truncated or foreign.") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path} must have format {FORMAT}, the one this version reads.")
    parts = (header.get("layers"), header.get("feed_forward", {}))
    if header.get("library") not in ("transformers", "torch") or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{path} is not a header that save_converted wrote.")
    return header


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: it is missing, truncated or foreign ({error}).") from error


def _load_pretrained(folder: Path, class_name: str) -> nn.Module:
    """A model by the name of its class, which must be one of transformers' own."""
    import transformers

    cls = getattr(transformers, str(class_name), None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise ValueError(f"{folder / HEADER} names the model class {class_name!r}, which transformers does not have.")
    try:
        # Without a name for its attention function, which only says that this function is to open the folder.
        return cls.from_pretrained(folder, local_files_only=True, use_safetensors=True, attn_implementation=None)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the model in {folder} cannot be read: {error}") from error

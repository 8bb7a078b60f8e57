"""The model to analyse and its data: text for language models, images for vision models, a checkpoint's own."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from approx_attn.config.instantiate import build
from approx_attn.diagnosis.analysis.tokens import with_decoder_inputs
from approx_attn.diagnosis.inputs import Batch, Source, load_source
from approx_attn.errors import ConfigError


def load(options: Mapping[str, Any], model: str, test_sequences: int = 0) -> Source:
    """A model with batches of its inputs.

    Args:
        options: `data`, `length`, `sequences` and `batch_size` of `configs/analyze.yaml`.
        model: hub id, folder, or checkpoint.
        test_sequences: how many to measure on, from another part of the data.

    Raises:
        ConfigError: a model or data that are not there.
    """
    vision = None if Path(model).suffix == ".ckpt" else vision_config(model)
    if vision is not None:
        return _images(options, model, vision, test_sequences)
    source = load_source(
        model,
        options["data"],
        length=options["length"],
        sequences=options["sequences"],
        test_sequences=test_sequences,
        batch_size=options["batch_size"],
    )
    first, second = ([with_decoder_inputs(source.model, b) for b in part] for part in (source.first, source.second))
    return Source(source.model, list(first), list(second), source.tokenizer, source.classes)


def vision_config(model: str) -> Any:
    """The configuration of a Hugging Face model that reads images alone; None for any other."""
    try:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model)
    except (ImportError, OSError, ValueError):
        return None  # the loader of text models says what is wrong
    return config if hasattr(config, "patch_size") and not hasattr(config, "vocab_size") else None


def _images(options: Mapping[str, Any], model: str, config: Any, test_sequences: int) -> Source:
    from transformers import AutoModel

    from approx_attn.data.base import SequenceDataModule

    if options["data"] is None:
        raise ConfigError(f"data must name labelled images (a hub id, folder or file) for model={model}.")
    node = {
        "_target_": "approx_attn.data.images.ImageClassificationData",
        "path": str(options["data"]),
        "resolution": config.image_size,
        "channels": config.num_channels,
        "batch_size": options["batch_size"],
        "eval_batch_size": options["batch_size"],
    }
    module = build(node, "data", SequenceDataModule)
    try:
        module.prepare_data()
        module.setup()
    except (ValueError, OSError, KeyError) as error:
        raise ConfigError(f"data={options['data']}: {' '.join(str(error).split())}") from error
    network = AutoModel.from_pretrained(model, use_safetensors=True).eval()
    parts: list[list[Any]] = []
    for loader, wanted in ((module.train_dataloader, options["sequences"]), (module.test_dataloader, test_sequences)):
        number = -(-wanted // options["batch_size"])
        parts.append(list(islice(loader(), number)) if number else [])
    inputs: list[list[Batch]] = [[{"pixel_values": batch["pixels"]} for batch in part] for part in parts]
    return Source(network, inputs[0], inputs[1], classes=[batch["labels"] for batch in parts[0] if "labels" in batch])

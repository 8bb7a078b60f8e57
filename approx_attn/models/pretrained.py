"""Models of Hugging Face transformers with their attention replaced, for fine-tuning in ordinary runs.

The weights come from a hub id, a folder, or a checkpoint that an earlier run wrote; the mechanism from the
configuration, as in every other model. A checkpoint says in plain containers how to build the network again, so
it is evaluated without the place that the weights once came from.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from approx_attn.attention import AttentionMask, AttentionMechanism, AttentionShape, build_attention
from approx_attn.attention.registry import AttentionSpec
from approx_attn.conversion.capture import capture_attention_inputs
from approx_attn.conversion.convert import convert
from approx_attn.conversion.installing import find_layers
from approx_attn.conversion.layers import SLOT, AttentionLayer
from approx_attn.errors import require_one_of
from approx_attn.models.base import SequenceModel, passes_options_to

TRAINED = ("all", "attention_only", "cross_attention_only")


class PretrainedModel(SequenceModel):
    """What the classes below share.

    Args:
        num_classes: outputs; None where the network's own stay.
        max_length: longest input in tokens, for mechanisms with parts laid out over positions; None where the
            inputs tell (images).
        path: hub id or folder of a model of transformers in safetensors, or a `.ckpt` file of an earlier run,
            whose mechanisms are left behind.
        architecture: the network's configuration as plain containers, which checkpoints hold; then nothing is read
            from `path` and the weights are random until a state dict has filled them.
        attention: the mechanism of the converted layers.
        layers: which layers are converted, as in `approx_attn.convert`; all if None.
        train: `all` parameters; `attention_only`: those of attention blocks, with their projections; or
            `cross_attention_only`: those of cross-attention blocks (Gheini, Ren and May 2021, arXiv 2104.08771).
            Parameters that `path` does not have, and the head of a classifier, are trained always.
        calibrate: training batches on which bases are fitted before training; 0 leaves them as they start.
        pad_id: token id of padding, for networks that do not know one.

    Raises:
        ValueError: transformers is missing, nothing that can be read at `path`, a network that cannot be
            converted, or an impossible value; the message names the key.
    """

    auto_class: ClassVar[str] = ""
    trains_head: ClassVar[bool] = True
    fits_bases = True
    new_parameters: list[str]

    def __init__(
        self,
        num_classes: int | None,
        max_length: int | None,
        pad_id: int | None = None,
        *,
        path: str | None = None,
        architecture: Mapping[str, Any] | None = None,
        attention: AttentionSpec = "exact",
        layers: str | list[str] | None = None,
        train: str = "all",
        calibrate: int = 8,
    ) -> None:
        super().__init__()
        if isinstance(calibrate, bool) or not isinstance(calibrate, int) or calibrate < 0:
            raise ValueError(f"model.calibrate must be a number of training batches of at least 0, got {calibrate!r}.")
        require_one_of("model.train", train, TRAINED)
        self.calibration_batches = calibrate
        self.new_parameters = []
        self.network = self._load(path, architecture, num_classes)
        if pad_id is not None and getattr(self.network.config, "pad_token_id", None) is None:
            self.network.config.pad_token_id = pad_id
        self._shapes, self._lengths = self._measure()
        with torch.random.fork_rng(devices=[]):  # the head must not depend on the numbers that a mechanism draws
            given = {"calibration": None, "example": self.example(), "max_length": max_length}  # later, by the task
            convert(self.network, attention, layers=layers, **given)  # type: ignore[arg-type]
        self.network.train()
        self._freeze(train)

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Refuse a `path` at which no model lies: data that take its tokenizer would name the tokenizer instead."""
        path = options.get("path")
        if options.get("architecture") is not None or not path:
            return
        if Path(path).suffix == ".ckpt":
            _read_checkpoint(path)
            return
        try:
            _auto_class("AutoConfig").from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # what the library raises depends on what is missing
            raise ValueError(f"model.path={path!r} cannot be loaded: {' '.join(str(error).split())}") from error

    def example(self) -> dict[str, Tensor]:
        """A small input of the network, to measure its attention layers with."""
        # The end of the sequence, which encoder-decoder classifiers look for.
        token = getattr(self.network.config, "eos_token_id", None)
        last = self.network.get_input_embeddings().weight.shape[0] - 1
        return {"input_ids": torch.full((1, 4), min(token if isinstance(token, int) else 1, last))}

    def logits(self, **inputs: Any) -> Tensor:
        """The `logits` of the network's output."""
        return self.network(**inputs).logits

    # -- what training asks ------------------------------------------------------------------------

    @property
    def mechanisms(self) -> list[AttentionMechanism]:
        """One mechanism per attention layer; a stand-in without parameters where attention is exact."""
        return [
            layer.mechanism
            or build_attention("exact", dataclasses.replace(self._shapes[layer.name], causal=layer.causal))
            for layer in self._layers()
        ]

    @property
    def rebuild_options(self) -> dict[str, Any]:
        """`architecture`, so that a checkpoint needs nothing from `path`."""

        def kept(described: dict[str, Any]) -> dict[str, Any]:
            # Names with an underscore say how this process runs the network, and could name code to download.
            left_out = ("auto_map", "attn_implementation")
            return {key: value for key, value in described.items() if not key.startswith("_") and key not in left_out}

        return {"architecture": json.loads(self.network.config.to_json_string(use_diff=False), object_hook=kept)}

    # -- building ----------------------------------------------------------------------------------

    def _load(self, path: str | None, architecture: Mapping[str, Any] | None, num_classes: int | None) -> Any:
        labels = {} if num_classes is None else {"num_labels": num_classes}
        auto = _auto_class(self.auto_class)
        if architecture is not None:
            return _from_architecture(auto, architecture, labels)
        if not path:
            raise ValueError(
                "model.path must be a hub id, a folder or a .ckpt file of a pretrained model, got nothing."
            )
        if Path(path).suffix == ".ckpt":
            network, missing = _from_checkpoint(auto, path, labels)
        else:
            network, missing = _from_pretrained(auto, path, labels)
        self.new_parameters = missing
        return network

    def _layers(self) -> list[AttentionLayer]:
        return [layer for layer in find_layers(self.network) if layer.name in self._shapes]

    def _measure(self) -> tuple[dict[str, AttentionShape], dict[str, int]]:
        """Shape, and number of queries on the example, of every attention layer."""
        shapes: dict[str, AttentionShape] = {}
        lengths: dict[str, int] = {}

        def note(name: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float) -> None:
            shapes[name], lengths[name] = AttentionShape.of(query, key, value), query.shape[-2]

        with torch.no_grad(), capture_attention_inputs(self.network.eval(), note):
            try:
                self.network(**self.example())
            except ValueError as error:
                raise ValueError(f"data: the model does not take these inputs: {error}") from error
        return shapes, lengths

    def _freeze(self, train: str) -> None:
        """Leave the gradient to the parameters that `train` names."""
        if train == "all":
            return
        chosen = [layer for layer in self._layers() if train == "attention_only" or layer.is_cross]
        if not chosen:
            raise ValueError(
                f"model.train={train} needs a network with cross-attention, which {type(self.network).__name__} "
                f"has not; accepted: {', '.join(TRAINED)}."
            )
        trained = {id(p) for layer in chosen for p in attention_block(self.network, layer.name).parameters()}
        body = f"{self.network.base_model_prefix}."
        for name, parameter in self.network.named_parameters():
            head = name in self.new_parameters or (self.trains_head and not name.startswith(body))
            if not (head or id(parameter) in trained):
                parameter.requires_grad_(False)  # what a mechanism froze itself stays frozen


class PretrainedClassifier(PretrainedModel):
    """Sequence classification: `AutoModelForSequenceClassification` with its attention replaced.

    Args:
        vocab_size, num_classes, max_length, pad_id: of the data.
        options: of `PretrainedModel`.

    Raises:
        ValueError: as `PretrainedModel`; data with more tokens or longer texts than the network knows.
    """

    auto_class = "AutoModelForSequenceClassification"

    @passes_options_to(PretrainedModel)
    def __init__(self, vocab_size: int, num_classes: int, max_length: int, pad_id: int = 0, **options: Any) -> None:
        super().__init__(num_classes, max_length, pad_id, **options)
        check_tokens(self.network, vocab_size, max_length)

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """Class scores.

        Args:
            tokens: (b, n) int64.
            keep: (b, n) bool, False where padded; all real if None.

        Returns:
            (b, num_classes) logits.
        """
        return self.logits(input_ids=tokens, attention_mask=None if keep is None else keep.long())


class PretrainedLanguageModel(PretrainedModel):
    """Causal language modelling: `AutoModelForCausalLM` with its attention replaced.

    Args:
        vocab_size, max_length, causal, pad_id: of the data.
        options: of `PretrainedModel`.

    Raises:
        ValueError: as `PretrainedModel`; data that is not causal, or with more tokens or longer texts than the
            network knows; a mechanism that cannot be causal.
    """

    auto_class = "AutoModelForCausalLM"
    trains_head = False  # its output map was trained, and is often the embedding
    causal = True

    @passes_options_to(PretrainedModel)
    def __init__(
        self, vocab_size: int, max_length: int, pad_id: int = 0, *, causal: bool = True, **options: Any
    ) -> None:
        if not causal:
            raise ValueError("model: PretrainedLanguageModel predicts what follows; use data.objective=causal.")
        super().__init__(None, max_length, pad_id, **options)
        check_tokens(self.network, vocab_size, max_length)

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """(b, n) token ids, and (b, n) bool, to (b, n, vocabulary) logits of the token that follows each."""
        mask = None if keep is None else keep.long()
        return self.logits(input_ids=tokens, attention_mask=mask, use_cache=False)


class PretrainedImageClassifier(PretrainedModel):
    """Image classification: `AutoModelForImageClassification`, such as ViT, with its attention replaced.

    Args:
        num_classes: of the data.
        max_length: pixels of the square images.
        options: of `PretrainedModel`.

    Raises:
        ValueError: as `PretrainedModel`; images of a size that the network does not take.
    """

    auto_class = "AutoModelForImageClassification"

    @passes_options_to(PretrainedModel)
    def __init__(self, num_classes: int, max_length: int, **options: Any) -> None:
        self._side = math.isqrt(max_length)
        super().__init__(num_classes, None, **options)

    def example(self) -> dict[str, Tensor]:
        """One black image of the size of the data."""
        channels = getattr(self.network.config, "num_channels", 3)
        return {"pixel_values": torch.zeros(1, channels, self._side, self._side)}

    @property
    def attention_length(self) -> int:
        """Patches of an image, with the tokens beside them."""
        return max(self._lengths.values())

    def forward(self, pixels: Tensor) -> Tensor:
        """(b, channels, height, width) images to (b, num_classes) logits."""
        return self.logits(pixel_values=pixels)


def attention_block(network: nn.Module, name: str) -> nn.Module:
    """The module around an attention module that holds its output projection too.

    In some networks, such as BERT, that is a sibling; the block around both is an attention by name as well.
    """
    while "Attention" in type(network.get_submodule(parent := name.rpartition(".")[0])).__name__ and parent:
        name = parent
    return network.get_submodule(name)


def check_tokens(network: Any, vocab_size: int, max_length: int) -> None:
    """Refuse data with more tokens, or longer texts, than a network has embeddings for."""
    rows = network.get_input_embeddings().weight.shape[0]
    if vocab_size > rows:
        raise ValueError(
            f"data.tokenizer has {vocab_size} tokens, the model only {rows}; use the model's own tokenizer."
        )
    positions = getattr(network.config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < max_length:
        raise ValueError(f"data.max_length must be at most the {positions} positions of the model, got {max_length}.")


# -- networks ------------------------------------------------------------------------------------------


def _auto_class(name: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError("model.path needs the transformers library: pip install 'approx-attn[hf]'.") from error
    return getattr(transformers, name)


def _from_pretrained(auto: Any, path: str, labels: dict[str, Any]) -> tuple[Any, list[str]]:
    """A network of transformers, and the names of the parameters that it had not."""
    try:
        with _quiet():
            network, info = auto.from_pretrained(
                path,
                **labels,
                dtype=torch.float32,
                use_safetensors=True,  # older files of weights can run code
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=False,
            )
    except Exception as error:  # what the library raises depends on what is missing
        raise ValueError(f"model.path={path!r} cannot be loaded: {' '.join(str(error).split())}") from error
    mismatched = [entry[0] for entry in info["mismatched_keys"]]
    return network, sorted({*info["missing_keys"], *mismatched})


def _from_architecture(auto: Any, architecture: Mapping[str, Any], labels: Mapping[str, Any]) -> Any:
    """A network with random weights from the configuration that a checkpoint holds."""
    from transformers import AutoConfig

    options = {key: value for key, value in architecture.items() if not key.startswith("_") and key != "auto_map"}
    for option in ("model_type", "attn_implementation", "dtype", "torch_dtype"):
        options.pop(option, None)
    if labels:  # the numbers of labels of the data; their names are those of the configuration if they fit
        names = options.get("id2label") or {}
        if len(names) != labels["num_labels"]:
            options = {key: value for key, value in options.items() if key not in ("id2label", "label2id")} | dict(
                labels
            )
    try:
        config = AutoConfig.for_model(str(architecture.get("model_type")), **options)
        return auto.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"model.architecture describes no network: {' '.join(str(error).split())}") from error


def _from_checkpoint(auto: Any, path: str, labels: dict[str, Any]) -> tuple[Any, list[str]]:
    """The network of a checkpoint without its mechanisms, and the names of the parameters that it had not."""
    architecture, weights = _read_checkpoint(path)
    network = _from_architecture(auto, architecture or {}, labels)
    prefix = "model.network."
    own = {
        key.removeprefix(prefix): value
        for key, value in weights.items()
        if key.startswith(prefix) and f".{SLOT}." not in key
    }
    expected = network.state_dict()
    fitting = {key: value for key, value in own.items() if key in expected and expected[key].shape == value.shape}
    network.load_state_dict(fitting, strict=False)
    return network, sorted(set(expected) - set(fitting))


def _read_checkpoint(path: str) -> tuple[Any, dict[str, Tensor]]:
    """Architecture and weights of a checkpoint, the weights read from the file only when they are used."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return saved["hyper_parameters"]["config"]["model"]["architecture"], saved["state_dict"]
    except Exception as error:  # damaged files fail in many ways
        raise ValueError(
            f"model.path={path!r} is not a checkpoint of a pretrained model ({' '.join(str(error).split())})."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's bars and its list of parameters that are new: a run says itself what it trains."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

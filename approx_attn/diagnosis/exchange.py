"""What a translation model that learned a new language keeps of the old one, and what it knows of the new words.

After Gheini, Ren and May, *Cross-Attention is All You Need: Adapting Pretrained Transformers for Machine Translation*
(2021, arXiv 2104.08771): a model of one pair of languages is trained further on a pair that shares one of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from approx_attn.data.generators.translation_languages import FULL_STOP, Language
from approx_attn.errors import ConfigError
from approx_attn.models.encoder_decoder import EMBEDDINGS
from approx_attn.run.evaluate import evaluate


def evaluate_with_words(
    checkpoint: str | Path, words: Mapping[str, str | Path], *, data: Mapping[str, Any]
) -> dict[str, float]:
    """Test figures of a translation model that reads or writes the words of other checkpoints.

    With the first words put back it is tested on the pair that it was trained on first; with the words of a model whose
    other language was exchanged, on a pair that neither model has seen.

    Args:
        checkpoint: of the model whose parts are used.
        words: `source` or `target` to the checkpoint whose embedding of that side takes the place of its own.
        data: options of the data that replace the stored ones, such as `source_language`.

    Returns:
        As `evaluate`.

    Raises:
        ConfigError: a side that is none, an embedding of another shape, or what `evaluate` refuses.
    """
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    for side, path in words.items():
        new, own = embedding(path, side), saved["state_dict"][_name(side)]
        if new.shape != own.shape:
            raise ConfigError(f"words.{side} must be of shape {tuple(own.shape)}, got {tuple(new.shape)}.")
        saved["state_dict"][_name(side)] = new
    with tempfile.TemporaryDirectory() as folder:
        torch.save(saved, path := Path(folder) / "combined.ckpt")
        return evaluate(path, data=data)


def embedding(checkpoint: str | Path, side: str) -> Tensor:
    """(vocabulary, dim) embedding of the `source` or `target` words in a checkpoint.

    Raises:
        ConfigError: a side that is none, or a checkpoint without it.
    """
    weights = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    if _name(side) not in weights:
        raise ConfigError(f"checkpoint={str(checkpoint)!r} must be of a model that translates, got none.")
    return weights[_name(side)]


def _name(side: str) -> str:
    if side not in EMBEDDINGS:
        raise ConfigError(f"words must be of {' or '.join(EMBEDDINGS)}, got {side!r}.")
    return f"model.{EMBEDDINGS[side]}"


def dictionary_accuracy(new: Tensor, old: Tensor, new_language: Language, old_language: Language) -> float:
    """Share of the new words whose nearest old word, by cosine of the embeddings, says the same.

    Right is any word of the concept that the new word belongs to; comma and full stop are left out.

    Args:
        new, old: (vocabulary, dim) embeddings of the words of two languages.
        new_language, old_language: whose dictionaries are known.
    """
    first = FULL_STOP + 1
    similarity = F.normalize(new[first:], dim=-1) @ F.normalize(old[first:], dim=-1).mT  # (new words, old words)
    nearest = (similarity.argmax(-1) + first).tolist()
    concept = {word: index for index, words in enumerate(old_language.words) for word in words}
    right = [
        concept[nearest[word - first]] == index for index, words in enumerate(new_language.words) for word in words
    ]
    return sum(right) / len(right)

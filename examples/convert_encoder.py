"""A Hugging Face encoder converted, calibrated and fine-tuned: `python examples/convert_encoder.py [--model <folder>]`.

Without `--model` a small BERT is made and trained on the spot for a few steps, so that nothing is downloaded. The task:
does a sentence hold more good words than bad ones?
"""

from __future__ import annotations

import argparse
import random

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import approx_attn

GOOD, BAD = ["fine", "great", "fun", "bright"], ["dull", "flat", "poor", "slow"]
OTHER = ["the", "film", "plot", "and", "a", "with", "of", "it", "was", "had"]


def main(model: str | None, steps: int, keep: float) -> dict[str, float]:
    """Accuracy of the exact model, of the converted one, and of that after fine-tuning."""
    torch.manual_seed(1)
    network, tokenizer = small_bert() if model is None else pretrained(model)
    train(network, tokenizer, steps, rate=1e-3 if model is None else 5e-5)
    accuracy = {"exact": test(network, tokenizer)}

    calibration = [encode(tokenizer, seed)[0] for seed in range(100, 104)]
    approx_attn.convert(network, attention="eigen_topk", rank=4, keep=keep, calibration=calibration)
    accuracy["converted"] = test(network, tokenizer)

    train(network, tokenizer, steps // 2, rate=2e-4 if model is None else 2e-5)
    accuracy["fine-tuned"] = test(network, tokenizer)
    for name, value in accuracy.items():
        print(f"{name:<12}{value:.1%}")
    return accuracy


def small_bert() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random BERT of two layers, with a tokenizer of the words above."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *OTHER]
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    tokenizer = BertTokenizerFast(vocab={word: index for index, word in enumerate(words)})
    return BertForSequenceClassification(config), tokenizer


def pretrained(folder: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of a hub or a folder, with a new head of two classes."""
    network = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    return network, AutoTokenizer.from_pretrained(folder)


def encode(
    tokenizer: PreTrainedTokenizerBase, seed: int, number: int = 32
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A batch of sentences (number, up to 20 tokens), and 1 where good words are in the majority."""
    draw = random.Random(seed)
    sentences, labels = [], []
    for _ in range(number):
        good = draw.randint(0, 3)
        bad = draw.choice([count for count in range(4) if count != good])
        words = draw.choices(GOOD, k=good) + draw.choices(BAD, k=bad) + draw.choices(OTHER, k=draw.randint(3, 12))
        draw.shuffle(words)
        sentences.append(" ".join(words))
        labels.append(int(good > bad))
    return dict(tokenizer(sentences, padding=True, return_tensors="pt")), torch.tensor(labels)


def train(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, steps: int, rate: float) -> None:
    """Some steps of AdamW, each on sentences of its own."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    network.train()
    for step in range(steps):
        inputs, labels = encode(tokenizer, seed=1000 + step)
        loss = network(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def test(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Share of 512 sentences that are classified rightly."""
    network.eval()
    right = 0
    for seed in range(16):
        inputs, labels = encode(tokenizer, seed)
        right += int((network(**inputs).logits.argmax(-1) == labels).sum())
    return right / 512


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="hub id or folder of an encoder; none: one is made on the spot")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--keep", type=float, default=0.25)
    main(**vars(parser.parse_args()))

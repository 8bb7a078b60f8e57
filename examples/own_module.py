"""A LightningModule of one's own with a mechanism inside: `python examples/own_module.py --attention eigen_topk`.

A small encoder says whether the two halves of a random sequence hold the same tokens. `approx_attn.MultiheadAttention`
takes the place of `torch.nn.MultiheadAttention`; everything else is plain PyTorch Lightning.
"""

from __future__ import annotations

import argparse

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import approx_attn

LENGTH, VOCABULARY = 16, 12


class Block(nn.Module):
    """Attention and a feed-forward layer, each with a residual branch."""

    def __init__(self, dim: int, attention: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])
        self.attention = approx_attn.MultiheadAttention(
            dim, num_heads=4, batch_first=True, attention=attention, max_length=LENGTH
        )
        self.feed_forward = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, dim) to (b, n, dim)."""
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.feed_forward(self.norms[1](x))


class SameHalves(pl.LightningModule):
    """Encoder, mean over tokens, one logit."""

    def __init__(self, attention: str = "eigen_topk", dim: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, dim))
        self.blocks = nn.Sequential(*(Block(dim, attention) for _ in range(depth)))
        self.head = nn.Linear(dim, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (b, n) to logits (b,)."""
        x = self.blocks(self.embedding(tokens) + self.positions)  # (b, n, dim)
        return self.head(x.mean(dim=1)).squeeze(-1)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        tokens, same = batch
        return F.binary_cross_entropy_with_logits(self(tokens), same)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        tokens, same = batch
        self.log("accuracy", ((self(tokens) > 0) == same.bool()).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def sequences(number: int, seed: int) -> TensorDataset:
    """Random tokens (number, LENGTH); half of them repeat their first half."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (number, LENGTH), generator=generator)
    same = torch.arange(number) % 2
    tokens[same.bool(), LENGTH // 2 :] = tokens[same.bool(), : LENGTH // 2]
    return TensorDataset(tokens, same.float())


def main(attention: str, epochs: int) -> float:
    """Train, validate, and return the accuracy."""
    pl.seed_everything(1, verbose=False)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    model = SameHalves(attention)
    trainer.fit(model, DataLoader(sequences(4096, seed=0), batch_size=64, shuffle=True))
    figures = trainer.validate(model, DataLoader(sequences(1024, seed=1), batch_size=256), verbose=False)
    print(f"{attention}: {figures[0]['accuracy']:.1%}")
    return figures[0]["accuracy"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", default="eigen_topk", help="name of a mechanism; approx-attn list shows them")
    parser.add_argument("--epochs", type=int, default=10)
    main(**vars(parser.parse_args()))

"""The experiments on attention as explanation: measures against definitions, one run of all of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon

from approx_attn.attention import AttentionMask, AttentionShape, build_attention
from approx_attn.config.compose import compose_config
from approx_attn.diagnosis.analysis.command import main
from approx_attn.diagnosis.analysis.explanation import (
    AttentionCall,
    GuidedTask,
    ObservedAttention,
    logits_and_weights,
    prediction_distance,
    token_weights,
    weight_divergence,
)
from approx_attn.diagnosis.analysis.explanation_runs import run_experiments
from approx_attn.run.evaluate import load_task
from approx_attn.run.train import train
from helpers import QUIET, TINY


def test_divergence_is_that_of_jensen_and_shannon() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 2, 3, 4, 5, generator=generator).double().softmax(-1).unbind(0)
    a[0, 0, 0] = torch.tensor([1.0, 0, 0, 0, 0])
    real = torch.tensor([[True, True, True, False], [True, False, False, False]])
    rows = [
        jensenshannon(a[i, h, q].numpy(), b[i, h, q].numpy()) ** 2
        for i, q in torch.nonzero(real).tolist()
        for h in range(3)
    ]
    assert float(weight_divergence(a, b, real)) == pytest.approx(np.mean(rows))
    opposite = torch.eye(2)[None, None]
    everyone = torch.ones(1, 2, dtype=torch.bool)
    assert float(weight_divergence(opposite, opposite.flip(-1), everyone)) == pytest.approx(np.log(2.0))


def test_prediction_distance() -> None:
    logits = torch.tensor([[100.0, 0.0], [0.0, 0.0]])
    assert prediction_distance(logits, logits.flip(-1)).tolist() == pytest.approx([1.0, 0.0])


def test_observed_attention_is_exact_and_can_be_told_its_weights() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 5, 4).unbind(0)
    mask = AttentionMask(key_keep=torch.tensor([[True] * 5, [True, True, False, False, False]]))
    observed = ObservedAttention(AttentionShape(2, 4))
    query.requires_grad_()
    output, _ = observed(query, key, value, mask)
    torch.testing.assert_close(output, build_attention("exact", num_heads=2, head_dim=4)(query, key, value, mask)[0])
    assert observed.weights is not None
    assert observed.weights.requires_grad
    observed.imposed = torch.full((2, 2, 5, 5), 0.2)
    torch.testing.assert_close(observed(query, key, value)[0], value.mean(2, keepdim=True).expand(2, 2, 5, 4))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    train(compose_config([*TINY, f"paths.run_dir={folder}"]))
    return folder / "checkpoints" / "best.ckpt"


def test_all_experiments_in_one_report(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["parts=[norms,explanation]", "sequences=8", "explanation_seeds=1", "divergence_weights=[1.0]"]
    options += [f"model={checkpoint}", f"output={tmp_path / 'out'}", "progress_bar=false", "random_tokens=false"]
    assert main(options) == 0
    rows = json.loads((tmp_path / "out" / "numbers.json").read_text())["tables"]["explanation"]
    guided = [f"context_free_{weights}" for weights in ("uniform", "own", "base", "adversary")]
    assert [row["experiment"] for row in rows] == ["base", "seed", "uniform", "imposed", "adversary", *guided]
    base, seed, uniform, imposed, adversary, *others = rows
    assert (base["distance_of_predictions"], base["divergence_of_weights"]) == pytest.approx((0.0, 0.0), abs=1e-6)
    assert uniform["divergence_of_weights"] is None
    assert imposed["divergence_of_weights"] is None
    assert [row["λ"] for row in others] == [None, None, None, 1.0]
    assert 0.0 < adversary["divergence_of_weights"] <= np.log(2.0)
    assert 0.0 < seed["distance_of_predictions"] <= 1.0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "figures/explanation.png" in page
    assert "tables/explanation.csv" in page
    assert "Explanation: test accuracy is" in page
    monkeypatch.setattr("approx_attn.diagnosis.analysis.explanation_runs.train", None)  # what is done is not run again
    assert main(options) == 0


def test_a_guided_model_weighs_tokens_as_its_guide_does(checkpoint: Path) -> None:
    guide = load_task(checkpoint)
    attention = {"_target_": "approx_attn.diagnosis.analysis.explanation.ObservedAttention", "_partial_": True}
    pooling = {"_target_": "approx_attn.models.AttentionPooling", "encoder": "affine", "dim": 16, "num_heads": 2}
    config = {**guide.config, "model": {**pooling, "attention": attention}}
    torch.manual_seed(0)
    task = GuidedTask(config, guide.spec, base=str(checkpoint)).eval()
    batch = {"tokens": torch.randint(1, 5, (3, 64)), "keep": torch.arange(64) < torch.tensor([[64], [40], [1]])}
    logits = task(batch)
    _, calls = logits_and_weights(guide, batch)  # type: ignore[arg-type]
    model = task.model
    x = model.encoder(model.token_embedding(batch["tokens"]))  # type: ignore[operator]
    _, _, value = model.attention.in_proj_weight.chunk(3)  # type: ignore[union-attr]
    pooled = []
    for i, length in enumerate((64, 40, 1)):
        mean_row = calls[-1].weights[i, :, :length].mean(1)  # (heads, tokens), over the real queries
        values = (x[i] @ value.T).unflatten(-1, (2, 8))
        pooled.append(torch.einsum("hn,nhd->hd", mean_row, values).flatten())
    expected = model.head(model.attention.out_proj(torch.stack(pooled)))  # type: ignore[operator, union-attr]
    torch.testing.assert_close(logits, expected)


def test_token_weights_are_means_over_real_queries() -> None:
    weights = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
    real = torch.tensor([[True, True]])
    assert token_weights(AttentionCall(weights, real)).tolist() == [[[[0.75, 0.25]]]]
    assert token_weights(AttentionCall(weights, real & torch.tensor([True, False]))).tolist() == [[[[1.0, 0.0]]]]


def test_one_weight_per_token_over_an_lstm(tmp_path: Path) -> None:
    """The model of the paper: its adversary and its context-free models."""
    model = ["model=attention_pooling", "~model.depth", "~model.feed_forward_dim", "model.dim=8", "model.num_heads=1"]
    train(compose_config(["debug=fast", *QUIET, *model, f"paths.run_dir={tmp_path / 'base'}"]))
    outcomes = run_experiments(
        tmp_path / "base" / "checkpoints" / "best.ckpt", tmp_path, seeds=2, divergence_weights=[0.5], progress=False
    )
    count = Counter(outcome.experiment for outcome in outcomes)
    assert count["base"] == 1
    assert set(count.values()) == {1, 2}
    assert len(count) == 9
    first, second = (o.prediction_distance for o in outcomes if o.experiment == "context_free_base")
    assert first != second
    assert all(0.0 <= outcome.accuracy <= 1.0 for outcome in outcomes)


def test_weights_of_a_model_are_those_it_uses(checkpoint: Path) -> None:
    task = load_task(checkpoint)
    batch = {"tokens": torch.randint(1, 5, (3, 64)), "keep": torch.ones(3, 64, dtype=torch.bool)}
    batch["keep"][1, 40:] = False
    logits, calls = logits_and_weights(task, batch)  # type: ignore[arg-type]
    torch.testing.assert_close(logits, task(batch))
    assert len(calls) == len(task.mechanisms)
    torch.testing.assert_close(calls[0].weights.sum(-1)[0], torch.ones(2, 64))
    assert calls[0].weights[1, :, :, 40:].abs().max() == 0.0


def test_bad_input_is_one_sentence(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["model=a/b", "parts=[explanation]"]) == 2
    assert "so model must be a checkpoint" in capsys.readouterr().err
    assert main([f"model={checkpoint}", "parts=[explanation]", "divergence_weights=[-1]"]) == 2
    assert "divergence_weights must list numbers of at least 0, got -1" in capsys.readouterr().err
    train(compose_config([*TINY, "attention=topk", f"paths.run_dir={tmp_path / 'other'}"]))
    other = tmp_path / "other" / "checkpoints" / "best.ckpt"
    assert main([f"model={other}", "parts=[explanation]", "sequences=4", "progress_bar=false"]) == 2
    assert "must be a classifier with attention=exact" in capsys.readouterr().err
    assert not (tmp_path / "analysis").exists()

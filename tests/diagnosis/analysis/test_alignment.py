"""Alignment error of attention: planted alignments whose error rate is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from approx_attn import MultiheadAttention
from approx_attn.config.compose import compose_config
from approx_attn.diagnosis.analysis.alignment import (
    MEASURES,
    SETTINGS,
    AlignmentCounts,
    GoldAlignment,
    alignment_errors,
)
from approx_attn.diagnosis.analysis.command import main
from approx_attn.run.train import train
from helpers import TINY


def gold(sure: list[tuple[int, int]], possible: list[tuple[int, int]] = []) -> GoldAlignment:  # noqa: B006
    """Of one pair of three words each, both with an end mark behind."""
    matrices = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    for kind, pairs in enumerate((sure, sure + possible)):
        for target, source in pairs:
            matrices[kind, 0, target, source] = True
    words = torch.tensor([[True, True, True, False]])
    return GoldAlignment(matrices[0], matrices[1], words, words)


def attending(*rows: int) -> Tensor:
    """(1, 1, 4, 4) weights of one head, all on one source token per row."""
    return nn.functional.one_hot(torch.tensor(rows), 4).float()[None, None]


def of_length(*lengths: float) -> Tensor:
    """(1, n, 1, 1) products of transformed vectors of these lengths."""
    return torch.tensor(lengths, dtype=torch.float32).square()[None, :, None, None]


def test_error_rate_is_that_of_och_and_ney() -> None:
    counts = AlignmentCounts()
    # links 0-0 (sure), 1-2 (possible), 2-1 (neither) against three sure links: 1 − (1 + 2) / (3 + 3)
    counts.update(attending(0, 2, 1, 3), of_length(1, 1, 1, 1), gold([(0, 0), (1, 1), (2, 2)], [(1, 2)]))
    assert counts.error_rate("output", "weight").tolist() == pytest.approx([0.5, 0.5])
    # a second pair, all right: 1 − (4 + 5) / (6 + 6)
    counts.update(attending(0, 1, 2, 3), of_length(1, 1, 1, 1), gold([(0, 0), (1, 1), (2, 2)]))
    assert counts.error_rate("output", "weight").tolist() == pytest.approx([0.25, 0.25])


def test_a_word_linked_to_the_end_mark_has_no_link() -> None:
    counts = AlignmentCounts()
    counts.update(attending(0, 1, 3, 0), of_length(1, 1, 1, 1), gold([(0, 0), (1, 1), (2, 2)]))
    assert int(counts.links["output", "weight"][0]) == 2
    assert float(counts.error_rate("output", "weight")[0]) == pytest.approx(1 - 4 / 5)


def test_the_input_setting_reads_a_word_one_row_later() -> None:
    counts = AlignmentCounts()
    counts.update(attending(3, 0, 1, 2), of_length(1, 1, 1, 1), gold([(0, 0), (1, 1), (2, 2)]))
    assert float(counts.error_rate("input", "weight")[0]) == pytest.approx(0.0)
    assert float(counts.error_rate("output", "weight")[0]) == pytest.approx(1.0)


def test_norms_see_through_large_weights_on_short_vectors() -> None:
    weights = 0.4 * attending(0, 1, 2, 0)
    weights[..., 3] += 0.6  # most weight on the end mark
    counts = AlignmentCounts()
    counts.update(weights, of_length(1, 1, 1, 0.1), gold([(0, 0), (1, 1), (2, 2)]))
    assert float(counts.error_rate("output", "weight")[0]) == pytest.approx(1.0)
    assert float(counts.error_rate("output", "norm")[0]) == pytest.approx(0.0)


def test_heads_that_cancel_count_for_a_layer_by_the_norm_of_their_sum() -> None:
    weights = torch.cat([attending(0, 1, 2, 3), attending(0, 1, 2, 3)], 1) * 0.6
    weights += 0.4 * attending(1, 2, 0, 3)
    opposite = torch.tensor([[1.0, -0.99], [-0.99, 1.0]]).expand(1, 4, 2, 2).clone()
    opposite[0, 1] = torch.ones(2, 2)  # only the heads' vectors of source word 1 agree
    counts = AlignmentCounts()
    counts.update(weights, opposite, gold([(0, 0), (1, 1), (2, 2)]))
    assert counts.error_rate("output", "norm").tolist() == pytest.approx([0.0, 0.0, 1 / 3])
    assert counts.error_rate("output", "weight").tolist() == pytest.approx([0.0, 0.0, 0.0])


class Copier(nn.Module):
    """Cross-attention from positions to positions with a planted alignment, and transformed vectors of known length."""

    def __init__(self, lengths: list[float]) -> None:
        super().__init__()
        self.cross = MultiheadAttention(8, 1, batch_first=True)
        with torch.no_grad():
            query, key, value = self.cross.in_proj_weight.chunk(3)
            for matrix, scale in ((query, 30.0), (key, 1.0), (value, 1.0), (self.cross.out_proj.weight, 1.0)):
                matrix.copy_(scale * torch.eye(8))
            value.diagonal()[:4] = torch.tensor(lengths)

    def forward(self, tokens: Tensor, tokens_b: Tensor) -> Tensor:
        """(b, n) source and (b, m) target, which are what attends to what."""
        source, target = (nn.functional.one_hot(x, 8).float() for x in (tokens, tokens_b))
        return self.cross(target, source, source, need_weights=False)[0]


def test_a_model_with_a_planted_alignment() -> None:
    inputs = {"tokens": torch.tensor([[0, 1, 2, 3]]), "tokens_b": torch.tensor([[2, 0, 1, 3]])}
    known = gold([(0, 2), (1, 0), (2, 1), (2, 0)])
    found = alignment_errors(Copier([1.0, 2.0, 3.0, 4.0]), [(inputs, known), (inputs, known)])
    (counts,) = found.layers.values()
    assert found.sentences == 2
    for measure in MEASURES:
        assert counts.error_rate("output", measure).tolist() == pytest.approx([1 - 6 / 7] * 2)
    assert found.least == pytest.approx(1 - 6 / 7)  # three links of four
    assert {key[0] for key in counts.links} == set(SETTINGS)


def test_a_model_without_cross_attention_is_refused() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = MultiheadAttention(8, 1, batch_first=True)

        def forward(self, tokens: Tensor) -> Tensor:
            x = nn.functional.one_hot(tokens, 8).float()
            return self.attention(x, x, x, need_weights=False)[0]

    with pytest.raises(ValueError, match="Plain has no cross-attention layer"):
        alignment_errors(Plain(), [({"tokens": torch.tensor([[0, 1]])}, gold([(0, 0)]))])


TRANSLATION = ["data=translation", "data.train_size=32", "data.val_size=8", "data.test_size=8"]


def test_the_report_of_a_translation_model(tmp_path: Path) -> None:
    train(compose_config([*TINY, *TRANSLATION, "metrics=[accuracy]", f"paths.run_dir={tmp_path / 'run'}"]))
    model = tmp_path / "run" / "checkpoints" / "best.ckpt"
    options = ["parts=[norms,alignment]", "sequences=8", "test_sequences=8", "progress_bar=false"]
    assert main([f"model={model}", *options, f"output={tmp_path / 'out'}"]) == 0
    tables = json.loads((tmp_path / "out" / "numbers.json").read_text())["tables"]
    assert [(row["layer"], row["setting"]) for row in tables["alignment"]] == [(0, "output"), (0, "input")]
    assert len(tables["alignment_heads"]) == 4
    for row in tables["alignment"]:
        of_heads = [r["norm"] for r in tables["alignment_heads"] if r["setting"] == row["setting"]]
        assert row["best_head_norm"] == min(of_heads)
        assert 0.0 <= row["layer_norm"] <= 1.0
    assert "Alignment error of cross-attention" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_data_without_gold_alignments_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["model=a/b", "parts=[alignment]"]) == 2
    assert "so model must be a checkpoint (.ckpt), got 'a/b'" in capsys.readouterr().err
    train(compose_config([*TINY, f"paths.run_dir={tmp_path / 'run'}"]))
    model = tmp_path / "run" / "checkpoints" / "best.ckpt"
    assert main([f"model={model}", "parts=[alignment]", "sequences=8", "progress_bar=false"]) == 2
    assert "parts=[alignment] needs a checkpoint of data with gold alignments" in capsys.readouterr().err
    assert not (tmp_path / "analysis").exists()

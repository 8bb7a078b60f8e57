"""A target sentence per source sentence: trained with the true target before each word, tested by greedy decoding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from approx_attn.data import IGNORE
from approx_attn.data.translation import BEGIN, END
from approx_attn.metrics import METRICS
from approx_attn.models.encoder_decoder import EncoderDecoder, greedy_decode
from approx_attn.run import distributed
from approx_attn.run.tasks.token_prediction import TokenPredictionTask


class TranslationTask(TokenPredictionTask):
    """Cross-entropy and accuracy over target words, each predicted from the true ones before it.

    A test also decodes greedily, if one of these metrics is asked for: `exact_match`, the share of sentences that are
    the reference word for word, and `bleu`, corpus BLEU of up to four words (Papineni et al. 2002) by sacrebleu
    (Post 2018), as a share of 1, over token ids as words. Arguments as `SequenceTask`.
    """

    kind = "translation"

    def on_test_epoch_start(self) -> None:
        super().on_test_epoch_start()
        self._sentences: list[tuple[str, str]] = []

    def test_step(self, batch: Mapping[str, Tensor], batch_index: int) -> None:
        super().test_step(batch, batch_index)
        if not self._decodes:
            return
        scored = (batch["labels"] != IGNORE).any(1)  # (b,)
        outputs = self.translate(batch)[scored]
        for output, reference in zip(outputs.tolist(), batch["labels"][scored].tolist(), strict=True):
            self._sentences.append((words(output), words(reference)))

    def translate(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(b, max_length) token ids of the greedy translation of each source, END and padding behind it."""
        model = cast(EncoderDecoder, self.model)  # as `build_model` has seen to
        inputs = self.inputs(batch)
        length, pad = self.spec["max_length"], self.spec["pad_id"]
        return greedy_decode(model, inputs["tokens"], inputs.get("keep"), length, BEGIN, END, pad)

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        if not self._decodes:
            return
        sentences = [pair for part in distributed.gathered(self._sentences) for pair in part]
        for name, value in sentence_figures(sentences).items():
            if name in self.metrics:
                self.log(f"test/{name}", torch.tensor(value))
        self._sentences = []

    @property
    def _decodes(self) -> bool:
        return any(METRICS[name].task == self.kind for name in self.metrics)


def words(tokens: list[int]) -> str:
    """The tokens of a sentence before its END, as words."""
    return " ".join(map(str, tokens[: tokens.index(END)] if END in tokens else tokens))


def sentence_figures(sentences: list[tuple[str, str]]) -> dict[str, float]:
    """`exact_match` and `bleu`, both from 0 to 1, of pairs of output and reference."""
    from sacrebleu import corpus_bleu  # half a second that only translation takes

    outputs, references = (list(side) for side in zip(*sentences, strict=True))
    bleu = corpus_bleu(outputs, [references], tokenize="none", force=True)
    matches = sum(output == reference for output, reference in sentences)
    return {"exact_match": matches / len(sentences), "bleu": bleu.score / 100}

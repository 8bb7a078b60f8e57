"""Perplexity of a causal language model when its attention is replaced, and the verb `approx-attn perplexity`.

Nothing is fine-tuned. With nats Σ −ln p of all predicted tokens, perplexity is exp(nats / tokens), and bits per byte,
which do not depend on the tokenizer, are nats / (bytes · ln 2).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from approx_attn.command import require_counts, run_plain, settings
from approx_attn.conversion.calibration.fitting import calibrate, model_output, with_progress
from approx_attn.diagnosis.calibrate import chosen_mechanisms, read_budgets, refinement_steps
from approx_attn.diagnosis.reconstruction import without_refusals
from approx_attn.diagnosis.text_windows import CausalModel, load_causal
from approx_attn.diagnosis.variants import Attention, basis_variants, converted_copy, costs
from approx_attn.errors import ConfigError
from approx_attn.output import print_table, require_file, shown_seconds, to_csv, to_table
from approx_attn.run.record import write_text_atomically

EXACT = "exact"


@dataclass
class Perplexity:
    """A mechanism on a text.

    Attributes:
        label: what the table calls the mechanism.
        perplexity: exp of the mean of −ln p over predicted tokens.
        bits_per_byte: Σ −log₂ p over the bytes of the text that they stand for.
        exact_share: share of the pairs whose exact score enters the result, at the length of a window.
        seconds: median time of a pass over a batch.
        relative_time: median over batches of that time over the one of exact attention on the same batch.
    """

    label: str
    perplexity: float
    bits_per_byte: float
    exact_share: float
    seconds: float
    relative_time: float


@dataclass
class _Sums:
    nats: float = 0.0
    seconds: list[float] = field(default_factory=list)


def measure_perplexity(
    source: CausalModel,
    mechanisms: Mapping[str, Attention],
    *,
    batch_size: int = 4,
    refine: int = 0,
    progress: bool = True,
) -> list[Perplexity]:
    """Perplexity and time of a model and of copies with other attention, batch by batch in turns.

    Args:
        source: a model that stays as it is, with windows to calibrate on and to measure.
        mechanisms: by label, `{"name": ..., **options}`, or budgets of all layers.
        batch_size: windows per batch.
        refine: steps of gradient; more than 0 adds mechanisms with a random and with a refined content basis.
        progress: show progress bars.

    Returns:
        The model as it is, called `exact`, and then the mechanisms in their order.

    Raises:
        ValueError: an unknown mechanism or option, a model that cannot be converted, or budgets of another one.
    """
    taken = [source.inputs(window) for window in source.first.batches(batch_size)]
    fitted = calibrate(source.model, taken, statistics=["content", "absolute"], progress=progress)
    mechanisms, bases = basis_variants(source.model, taken, mechanisms, fitted, refine, progress)
    length = source.second.tokens.shape[1] - 1
    models = {EXACT: source.model.eval()}
    for label, attention in mechanisms.items():
        models[label] = converted_copy(source.model, attention, bases.get(label, fitted), length)
    sums = {label: _Sums() for label in models}
    batches = list(source.second.batches(batch_size))
    with torch.no_grad():
        for model in models.values():
            _timed_logits(model, source.inputs(batches[0]))  # the first pass of a model also prepares
        for window in with_progress(batches, progress, "measuring"):
            for label, model in models.items():
                logits, seconds = _timed_logits(model, source.inputs(window))
                sums[label].nats += _nats(logits, window[:, 1:])
                sums[label].seconds.append(seconds)
    predicted = source.second.tokens[:, 1:].numel()
    exact_seconds = np.array(sums[EXACT].seconds)
    return [
        Perplexity(
            label=label,
            perplexity=math.exp(sums[label].nats / predicted),
            bits_per_byte=sums[label].nats / math.log(2) / source.second.num_bytes,
            exact_share=1.0 if label == EXACT else costs(model, length, causal=True)[0].exact_share,
            seconds=float(np.median(sums[label].seconds)),
            relative_time=float(np.median(np.array(sums[label].seconds) / exact_seconds)),
        )
        for label, model in models.items()
    ]


def _timed_logits(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, float]:
    device = next(model.parameters()).device
    started = time.perf_counter()
    output = model_output(model, inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    return (output if isinstance(output, Tensor) else output.logits), seconds


def _nats(logits: Tensor, labels: Tensor) -> float:
    """Σ −ln p of labels (b, n) under logits (b, n, tokens)."""
    return float(F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten().to(logits.device), reduction="sum"))


# -- the verb ------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """`approx-attn perplexity`: perplexity of a causal model and of its conversions."""
    return run_plain("perplexity", lambda: perplexity(settings("perplexity", arguments)), arguments)


def perplexity(options: Mapping[str, Any]) -> list[Perplexity]:
    """Measure what `configs/perplexity.yaml` asks for, print the table and write it.

    Raises:
        ConfigError: a model, a text or a mechanism that cannot be used.
    """
    budgets, steps = read_budgets(options), refinement_steps(options)
    mechanisms = chosen_mechanisms(options)
    output = require_file("output", options["output"])
    sizes = {key: options[key] for key in ("length", "sequences", "test_sequences")}
    require_counts({key: value for key, value in sizes.items() if value is not None or key == "sequences"})
    require_counts({"batch_size": options["batch_size"]})
    source = load_causal(str(options["model"]), options["data"], **sizes)
    if options["attention"] is None:  # nobody asked for the others by name
        mechanisms = _causal_only(source, mechanisms)
    try:
        results = measure_perplexity(
            source,
            {**mechanisms, **budgets},
            batch_size=options["batch_size"],
            refine=steps,
            progress=options["progress_bar"],
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    windows, length = source.second.tokens.shape
    title = f"Perplexity of {options['model']}: {windows} windows of {length - 1} tokens"
    print_table(to_table([_cells(row) for row in results], title=title, caption="Time: median pass over a batch."))
    write_text_atomically(output, to_csv(list(map(asdict, results))))
    print(output)
    return results


def _causal_only(source: CausalModel, mechanisms: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    first = [source.inputs(next(source.first.batches(1)))]
    seen = calibrate(source.model, first, statistics=["content"], progress=False)
    taken, refused = without_refusals(mechanisms, seen)
    if refused:
        print(f"Not measured, for lack of causal attention: {', '.join(refused)}.")
    return taken


def _cells(row: Perplexity) -> dict[str, str]:
    return {
        "attention": row.label,
        "perplexity": f"{row.perplexity:.3f}",
        "bits per byte": f"{row.bits_per_byte:.4f}",
        "exact pairs": f"{row.exact_share:.1%}",
        "time": shown_seconds(row.seconds),
        "time / exact": f"{row.relative_time:.2f}×",
    }

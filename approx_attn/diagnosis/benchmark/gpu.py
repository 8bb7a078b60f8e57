"""What a machine with a GPU must show of `eigen_cluster`: that it is right there, how fast it is and what it holds.

One command, a few minutes: outputs and gradients against the same mechanism in float64 on the CPU, then time, memory
and error beside PyTorch's flash attention at long lengths in bfloat16.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from approx_attn.attention import AttentionMask, AttentionMechanism, build_attention
from approx_attn.attention.exact import exact_attention_with_weights
from approx_attn.command import WRONG_INPUT
from approx_attn.diagnosis.benchmark.command import conditions, measure, write_files
from approx_attn.diagnosis.benchmark.settings import label_of, read_settings
from approx_attn.diagnosis.benchmark.sources import StructuredInputs, load_inputs
from approx_attn.diagnosis.benchmark.table import Row, as_tables, notes
from approx_attn.output import print_table, require_folder, to_csv, to_table
from approx_attn.run.record import write_text_atomically

MECHANISM = "eigen_cluster"
BOUNDS = {torch.float32: 2e-3, torch.bfloat16: 1e-2}
"""Largest relative errors. Rounding may choose another of two clusters that matter equally, which moves single rows."""

CASES = ("plain", "padding", "causal", "causal and padding", "window", "keep=1.0 beside exact attention")
OPTIONS = {8192: {"keep": 112, "cluster_size": 16, "rank": 4}, 32768: {"keep": 224, "cluster_size": 32, "rank": 4}}
SETTINGS = ["dtype=bfloat16", "num_heads=16", "sequences=2", "repeats=10", "warm_up=3", "causal=[false,true]"]
DEADLINE = 400.0  # seconds after which no further place is measured


@dataclass(frozen=True)
class Check:
    """One comparison with float64.

    Attributes:
        case: what was asked for.
        dtype: of inputs and parameters.
        output_error: ‖Ô − O‖ / ‖O‖.
        gradient_error: the same of the gradients of query, key and value, the largest.
        bound: what both must stay below.
    """

    case: str
    dtype: str
    output_error: float
    gradient_error: float
    bound: float

    @property
    def is_passed(self) -> bool:
        return max(self.output_error, self.gradient_error) < self.bound  # false for NaN, too


def main(arguments: Sequence[str] = ()) -> int:
    """`python scripts/gpu.py [folder]`; returns the exit code: 1 if a check failed, 2 without a GPU."""
    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device, and this measures one.", file=sys.stderr)
        return WRONG_INPUT
    folder = require_folder("output", arguments[0] if arguments else "results/gpu")
    torch.backends.cuda.enable_cudnn_sdp(False)  # which may go before flash attention, the one to compare with
    return 0 if examine(torch.device("cuda"), OPTIONS, SETTINGS, folder) else 1


def examine(
    device: torch.device,
    options: Mapping[int, Mapping[str, Any]],
    settings: Sequence[str],
    folder: Path,
    check_length: int = 512,
) -> bool:
    """Check and measure, print one table of each and write them into a folder.

    Args:
        options: of the mechanism, by the lengths to measure.
        settings: of `approx-attn benchmark`, for the measuring.
        check_length: tokens of the checks.

    Returns:
        Whether all checks passed.
    """
    start = time.monotonic()
    checks = [check(case, dtype, device, check_length) for dtype in BOUNDS for case in CASES]
    title = f"{MECHANISM} beside float64 on the CPU"
    print_table(to_table(list(map(_cells, checks)), words=("type", "verdict"), title=title))
    cfg = {**read_settings(settings), "device": device.type}
    rows: list[Row] = []
    below = []
    for length, chosen in options.items():
        spec = {"name": MECHANISM, **chosen}
        for causal in cfg["causal"]:
            here = {**cfg, "causal": causal}
            if time.monotonic() - start > DEADLINE:
                below.append(f"{length:,} tokens{', causal' if causal else ''}: not measured, the time was over.")
                continue
            source = load_inputs(here, length, [spec])
            for pass_name in cfg["pass"]:
                rows += measure({label_of(spec): spec}, source, length, pass_name, here, device)
    below = [*notes(rows), *below, conditions(cfg, device)]
    for table in as_tables(rows):
        print_table(table)
    print("\n".join(below))
    write_files(rows, folder, "\n".join(below))
    write_text_atomically(folder / "checks.csv", to_csv([{**asdict(c), "passed": c.is_passed} for c in checks]))
    print(folder)
    return all(check.is_passed for check in checks)


# -- correctness -----------------------------------------------------------------------------------------


def check(case: str, dtype: torch.dtype, device: torch.device, length: int) -> Check:
    """Compare output and gradients in a type on a device with those of the same numbers in float64 on the CPU."""
    heads, dim = 4, 32
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    draw = StructuredInputs(heads, dim, generator)
    tensors = [x.to(dtype) for x in (*draw(2, heads, length, dim, generator), torch.randn(2, heads, length, dim))]
    beside_exact = case.startswith("keep=1.0")
    mechanism = build_attention(MECHANISM, num_heads=heads, head_dim=dim, keep=1.0 if beside_exact else 0.25, seed=0)
    mechanism = mechanism.to(dtype)
    reference = copy.deepcopy(mechanism).double()
    mask, mask_there = (_mask(case, length, place) for place in (torch.device("cpu"), device))
    expected = _pass(reference, [x.double() for x in tensors], mask, beside_exact)
    got = _pass(mechanism.to(device), [x.to(device) for x in tensors], mask_there, exact=False)
    output, *gradients = (float((a.cpu().double() - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True))
    return Check(case, str(dtype).removeprefix("torch."), output, max(gradients), BOUNDS[dtype])


def _mask(case: str, length: int, device: torch.device) -> AttentionMask:
    keep = None
    if "padding" in case:
        keep = torch.ones(2, length, dtype=torch.bool, device=device)
        keep[1, length // 3 :] = False
    return AttentionMask(key_keep=keep, causal="causal" in case, window=length // 4 if case == "window" else None)


def _pass(mechanism: AttentionMechanism, tensors: Sequence[Tensor], mask: AttentionMask, exact: bool) -> list[Tensor]:
    """The output, and the gradients of query, key and value."""
    query, key, value = (x.detach().clone().requires_grad_() for x in tensors[:3])
    if exact:
        output = exact_attention_with_weights(query, key, value, mask, query.shape[-1] ** -0.5, 0.0)[0]
    else:
        output = mechanism(query, key, value, mask)[0]
    return [output.detach(), *torch.autograd.grad(output, (query, key, value), tensors[3])]


def _cells(row: Check) -> dict[str, str]:
    errors = {"error of output": row.output_error, "of gradients": row.gradient_error, "bound": row.bound}
    shown = {header: f"{error:.1e}" for header, error in errors.items()}
    return {"case": row.case, "type": row.dtype, **shown, "verdict": "passed" if row.is_passed else "FAILED"}

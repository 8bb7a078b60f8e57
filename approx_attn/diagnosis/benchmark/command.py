"""Time, memory and error of every mechanism in one table from one run.

A mechanism that is fast is easy to find, and so is one that is accurate; this table shows both on the same
inputs, with `scaled_dot_product_attention` taking its turn in every round of the same process.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from approx_attn.attention import AttentionMask, AttentionMechanism, Cost
from approx_attn.attention.calibrated import BasisMechanism
from approx_attn.command import as_list, run_plain
from approx_attn.diagnosis.benchmark.decoding import decode_call, steps_at
from approx_attn.diagnosis.benchmark.memory import OutOfMemory, fresh_process_memory, is_out_of_memory
from approx_attn.diagnosis.benchmark.settings import DTYPES, check, label_of, read_settings
from approx_attn.diagnosis.benchmark.sources import SYNTHETIC, LayerInputs, Source, build, load_inputs
from approx_attn.diagnosis.benchmark.table import SDPA, Row, as_tables, heading, notes, read_references
from approx_attn.errors import ConfigError, warn
from approx_attn.output import print_table, require_folder, to_csv
from approx_attn.run.measurement import Timing, peak_memory, time_alternately
from approx_attn.run.record import source_commit, write_text_atomically

QUIET_LOAD = 0.5  # processes that want to run, on average over the last minute


def main(arguments: Sequence[str]) -> int:
    """`approx-attn benchmark key=value ...`; returns the exit code."""
    return run_plain("benchmark", lambda: benchmark(read_settings(arguments)), arguments)


def benchmark(cfg: Mapping[str, Any]) -> list[Row]:
    """Measure what a configuration (`configs/benchmark.yaml`) asks for, print the table and write the files.

    Raises:
        ConfigError: a wrong value, before anything is measured.
    """
    entries = check(cfg)
    output = require_folder("output", cfg["output"])
    references = read_references(cfg["reference"] or [])
    device = _device(str(cfg["device"]))
    if cfg["threads"] is not None:
        torch.set_num_threads(int(cfg["threads"]))
    load = load_of_machine()
    rows: list[Row] = []
    left_out: dict[str, None] = {}
    for length in cfg["length"]:
        for causal in dict.fromkeys(as_list(cfg["causal"])):
            asked = [entry for entry in entries if entry.is_asked_for(length, causal)]
            left_out |= dict.fromkeys(entry.label for entry in asked if causal and not entry.can_be_causal)
            here = {**cfg, "causal": causal}
            specs = {entry.label: entry.options for entry in asked if entry.can_be_causal or not causal}
            source = load_inputs(here, length, list(specs.values()))
            if load is not None and load > QUIET_LOAD and device.type == "cpu":
                said = f"the machine is not quiet (load {load:.2f} before the start)"
                warn(f"{said}, so times and ratios are less certain.")
            for pass_name in cfg["pass"]:
                if cfg["progress_bar"]:
                    print(heading(length, causal, pass_name))
                rows += measure(specs, source, length, pass_name, here, device)
                rows += [row for row in references if row.place == (length, causal, pass_name)]
    below = notes(rows)
    if left_out:
        below.append(f"Not causal, so without causal rows: {', '.join(left_out)}.")
    if references and not any(row.reference for row in rows):
        below.append("No row of reference has a length, causality and pass that were measured here.")
    below.append(conditions(cfg, device, load))
    for table in as_tables(rows):
        print_table(table)
    print("\n".join(below))
    print(write_files(rows, output, "\n".join(below)))
    return rows


def load_of_machine() -> float | None:
    """Processes that run or want to, on average over the last minute; None where the system does not say."""
    with suppress(OSError, AttributeError):
        return os.getloadavg()[0]
    return None


# -- measuring -----------------------------------------------------------------------------------------------


def measure(
    specs: Mapping[str, Mapping[str, Any]],
    source: Source,
    length: int,
    pass_name: str,
    cfg: Mapping[str, Any],
    device: torch.device,
) -> list[Row]:
    """The rows of one length and pass, SDPA first."""
    dtype = DTYPES[str(cfg["dtype"])]
    inputs = source.layers[0].to(device, dtype)
    cfg = {**cfg, "num_heads": inputs.query.shape[1], "head_dim": inputs.query.shape[-1]}
    causal = bool(cfg["causal"])
    exact = cost_of_pass(build({"name": "exact"}, inputs.query, inputs.key, causal), length, pass_name, causal)
    empty = Row("", length, pass_name, causal, commit=source_commit() or "")
    sdpa = replace(empty, label=SDPA, exact_share=1.0, computed_share=1.0, error=0.0)
    rows = {SDPA: replace(sdpa, multiply_adds=exact.multiply_adds)}
    runs: dict[str, Callable[[], object]] = {SDPA: sdpa_call(inputs, pass_name, causal)}
    for label, spec in specs.items():
        row = replace(empty, label=label)
        try:
            row = replace(row, peak_bytes=_memory(spec, length, pass_name, cfg, device))
            mechanism, note = calibrated(spec, source, 0, cfg)
            mechanism = mechanism.to(device, dtype)
            cost = cost_of_pass(mechanism, length, pass_name, causal)
            row = replace(row, note=note, compiled=mechanism.runs_compiled(device, dtype))
            row = replace(row, exact_share=cost.exact_share, computed_share=cost.computed_share)
            row = replace(row, multiply_adds=cost.multiply_adds)
            row = replace(row, error=output_error(spec, source, length, cfg, device, pass_name))
            runs[label] = call(mechanism, inputs, pass_name, causal)
            runs[label]()  # memory that is not there shows now, not among the measured rounds
        except (OutOfMemory, RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            runs.pop(label, None)
            row = replace(row, note="out of memory")
        except ValueError as error:
            row = replace(row, note=str(error))
        rows[label] = row
    if cfg["memory"]:
        rows[SDPA] = replace(rows[SDPA], peak_bytes=_memory({"name": "exact"}, length, pass_name, cfg, device))
    timings = time_alternately(runs, cfg["repeats"], cfg["warm_up"])
    if pass_name == "decode":
        timings = {label: timing.divided_by(steps_at(length)) for label, timing in timings.items()}
    return [_with_timing(row, timings.get(label), timings[SDPA], exact.multiply_adds) for label, row in rows.items()]


def cost_of_pass(mechanism: AttentionMechanism, length: int, pass_name: str, causal: bool) -> Cost:
    """Of a pass over one sequence, or of one step at the end of it."""
    return mechanism.decoding_cost(length) if pass_name == "decode" else mechanism.cost(length, causal=causal)


def _with_timing(row: Row, timing: Timing | None, sdpa: Timing, exact_multiply_adds: int) -> Row:
    relative = None if row.multiply_adds is None else row.multiply_adds / exact_multiply_adds
    row = replace(row, relative_multiply_adds=relative)
    if timing is None:
        return row
    row = replace(row, seconds=timing.median, spread=timing.spread)
    return replace(row, speedup=sdpa.relative_to(timing), speedup_spread=sdpa.spread_relative_to(timing))


def calibrated(
    spec: Mapping[str, Any], source: Source, index: int, cfg: Mapping[str, Any]
) -> tuple[AttentionMechanism, str]:
    """A mechanism fitted to the calibration part of a layer's inputs, and a note if it could not be.

    One that starts from a file (`basis`) stays as that says.
    """
    torch.manual_seed(int(cfg["seed"]))
    layer = source.layers[index]
    mechanism = build(spec, layer.query, layer.key, bool(cfg["causal"]))
    if isinstance(mechanism, BasisMechanism) and spec.get("basis") is not None:
        return mechanism, ""
    return mechanism, source.calibrate(mechanism, label_of(spec), layer.index)


def call(
    mechanism: AttentionMechanism, inputs: LayerInputs, pass_name: str, causal: bool
) -> Callable[[], Tensor | None]:
    """One pass of a mechanism, ready to be timed."""
    if pass_name == "decode":
        return decode_call(mechanism.eval(), inputs)
    mask = AttentionMask(causal=causal)
    return _pass(lambda q, k, v: mechanism(q, k, v, mask, scale=inputs.scale)[0], inputs, pass_name, mechanism)


def sdpa_call(inputs: LayerInputs, pass_name: str, causal: bool) -> Callable[[], Tensor | None]:
    """One pass of `scaled_dot_product_attention`, ready to be timed."""
    if pass_name == "decode":
        return decode_call(None, inputs)
    grouped = inputs.query.shape[1] != inputs.key.shape[1]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=inputs.scale, enable_gqa=grouped)

    return _pass(attend, inputs, pass_name, None)


def _pass(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    inputs: LayerInputs,
    pass_name: str,
    mechanism: AttentionMechanism | None,
) -> Callable[[], Tensor | None]:
    if pass_name == "forward":
        if mechanism is not None:
            mechanism.eval()

        @torch.no_grad()
        def forward() -> Tensor:
            return attend(inputs.query, inputs.key, inputs.value)

        return forward

    if mechanism is not None:
        mechanism.train()
    q, k, v = (x.detach().clone().requires_grad_() for x in (inputs.query, inputs.key, inputs.value))
    gradient = torch.randn_like(inputs.query[..., :1]).expand(*inputs.query.shape[:3], inputs.value.shape[-1])
    gradient = gradient.contiguous()

    def train() -> None:
        attend(q, k, v).backward(gradient)
        q.grad = k.grad = v.grad = None
        if mechanism is not None:
            mechanism.zero_grad()

    return train


@torch.no_grad()
def output_error(
    spec: Mapping[str, Any],
    source: Source,
    length: int,
    cfg: Mapping[str, Any],
    device: torch.device,
    pass_name: str = "forward",
) -> float:
    """Relative error of the output against exact attention in float64, mean over layers and heads."""
    total, causal = 0.0, bool(cfg["causal"])
    for index, layer in enumerate(source.layers):
        mechanism = calibrated(spec, source, index, cfg)[0].to(device, DTYPES[str(cfg["dtype"])])
        inputs = layer.to(device, DTYPES[str(cfg["dtype"])])
        output = call(mechanism, inputs, "decode" if pass_name == "decode" else "forward", causal)()
        assert output is not None
        first = length - output.shape[2]  # steps of decoding are the last queries
        # All queries run, as they may share choices; a spread of them is compared.
        chosen = torch.linspace(first, length - 1, min(length - first, int(cfg["error_queries"])), device=device).long()
        output = output[:, :, chosen - first]
        keep = torch.arange(length, device=device) <= chosen[:, None] if causal else None
        expected = F.scaled_dot_product_attention(
            inputs.query[:, :, chosen].double(),
            inputs.key.double(),
            inputs.value.double(),
            attn_mask=keep,
            scale=inputs.scale,
            enable_gqa=inputs.query.shape[1] != inputs.key.shape[1],
        )
        difference = (output.double() - expected).norm(dim=(-2, -1))
        total += float((difference / expected.norm(dim=(-2, -1)).clamp_min(1e-30)).mean())
    return total / len(source.layers)


def _memory(
    spec: Mapping[str, Any], length: int, pass_name: str, cfg: Mapping[str, Any], device: torch.device
) -> int | None:
    if not cfg["memory"]:
        return None
    if device.type == "cpu":
        return fresh_process_memory(memory_of_one_pass, spec, length, pass_name, cfg)
    return memory_of_one_pass(spec, length, pass_name, cfg, lambda run: peak_memory(run, device))


def memory_of_one_pass(
    spec: Mapping[str, Any],
    length: int,
    pass_name: str,
    cfg: Mapping[str, Any],
    measure_peak: Callable[[Callable[[], object]], int],
) -> int:
    """Peak bytes of one pass over random inputs of the right shape, by a given way of measuring."""
    device = _device(str(cfg["device"]))
    shape = (int(cfg["batch_size"]), int(cfg["num_heads"]), length, int(cfg["head_dim"]))
    dtype = DTYPES[str(cfg["dtype"])]
    query, key, value = (torch.randn(shape, dtype=dtype, device=device) for _ in range(3))
    inputs = LayerInputs(query, key, value, None)
    mechanism = build(spec, query, key, bool(cfg["causal"])).to(device, dtype)
    small = LayerInputs(query[:, :, :32], key[:, :, :32], value[:, :, :32], None)
    if mechanism.capabilities.variable_length:
        call(mechanism, small, pass_name, bool(cfg["causal"]))()  # libraries that load on first use
    return measure_peak(call(mechanism, inputs, pass_name, bool(cfg["causal"])))


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: torch sees no CUDA device; use device=cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


# -- showing -------------------------------------------------------------------------------------------------


def conditions(cfg: Mapping[str, Any], device: torch.device, load: float | None = None) -> str:
    """Under which conditions the numbers were measured, in one line."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    kind = "synthetic" if cfg["source"] in SYNTHETIC else "captured"
    causal = " and ".join("causal" if value else "not causal" for value in as_list(cfg["causal"]))
    return (
        f"{where}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{cfg['dtype']}; {kind} source {cfg['source']}, {cfg['sequences']} sequences to calibrate; "
        f"batch {cfg['batch_size']}; {causal}; "
        f"median of {cfg['repeats']} rounds after {cfg['warm_up']} to warm up"
        f"{'' if load is None else f'; load {load:.2f} before the start'}"
        f"; commit {source_commit() or 'unknown'}"
    )


def write_files(rows: Sequence[Row], folder: Path, caption: str) -> Path:
    """`table.csv`, `conditions.txt`, `time.png` and `frontier.png` in a folder, which is returned."""
    write_text_atomically(folder / "table.csv", to_csv(list(map(asdict, rows))))
    write_text_atomically(folder / "conditions.txt", caption + "\n")
    # Not above: the processes in which memory is measured import this module, and draw nothing.
    from approx_attn.diagnosis.benchmark.plots import plot_frontier, plot_time

    plot_time(rows, folder / "time.png")
    plot_frontier(rows, folder / "frontier.png")
    return folder

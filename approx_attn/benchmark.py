"""Time, memory and error of every mechanism in one table from one run.

A mechanism that is fast is easy to find, and so is one that is accurate; this table shows both on the same
inputs, with `scaled_dot_product_attention` taking its turn in every round of the same process.
"""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from approx_attn.attention import AttentionMask, AttentionMechanism, attention_class, build_attention
from approx_attn.benchmark_memory import OutOfMemory, fresh_process_memory, is_out_of_memory
from approx_attn.benchmark_sources import SYNTHETIC, LayerInputs, Source, load_inputs
from approx_attn.instantiation import ConfigError
from approx_attn.measurement import Timing, peak_memory, time_alternately
from approx_attn.output import print_table, require_folder

PASSES = ("forward", "train")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
DEVICES = ("auto", "cpu", "cuda")
SDPA = "sdpa"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        label: mechanism and the options that were given.
        length: tokens.
        pass_name: `forward` or `train`.
        seconds: median time of a call; None where it did not run.
        spread: interquartile range of the times, seconds.
        speedup: time of SDPA over this time, median over the rounds.
        peak_bytes: most memory held beyond inputs and parameters; None where not measured.
        exact_share: share of pairs whose score is exact, 0 to 1.
        multiply_adds: of a forward pass over one sequence, from the cost record.
        relative_multiply_adds: the same relative to exact attention.
        error: ‖Ô − O‖ / ‖O‖, mean over layers and heads; None where not measured.
        note: why something is missing.
    """

    label: str
    length: int
    pass_name: str
    seconds: float | None = None
    spread: float | None = None
    speedup: float | None = None
    peak_bytes: int | None = None
    exact_share: float | None = None
    multiply_adds: int | None = None
    relative_multiply_adds: float | None = None
    error: float | None = None
    note: str = ""


def main(arguments: Sequence[str]) -> int:
    """`approx-attn benchmark key=value ...`; returns the exit code."""
    from approx_attn.command import run_plain, settings

    return run_plain("benchmark", lambda: benchmark(settings("benchmark", arguments)), arguments)


def benchmark(cfg: Mapping[str, Any]) -> list[Row]:
    """Measure what a configuration (`configs/benchmark.yaml`) asks for, print the table and write the files.

    Raises:
        ConfigError: a wrong value, before anything is measured.
    """
    specs = check(cfg)
    output = require_folder("output", cfg["output"])
    device = _device(str(cfg["device"]))
    if cfg["threads"] is not None:
        torch.set_num_threads(int(cfg["threads"]))
    rows: list[Row] = []
    for length in cfg["length"]:
        source = load_inputs(cfg, length)
        for pass_name in cfg["pass"]:
            if cfg["progress_bar"]:
                print(f"{length} tokens, {pass_name}")
            rows += measure(specs, source, length, pass_name, cfg, device)
    for table in as_tables(rows):
        print_table(table)
    print(conditions(cfg, device))
    print(write_files(rows, output, conditions(cfg, device)))
    return rows


def check(cfg: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The mechanisms that a configuration names, options by label.

    Raises:
        ConfigError: an unknown name or option, or a value that nothing can be done with.
    """
    for key, accepted in (("pass", PASSES), ("dtype", tuple(DTYPES)), ("device", DEVICES)):
        for value in cfg[key] if isinstance(cfg[key], list) else [cfg[key]]:
            if value not in accepted:
                raise ConfigError(f"{key} must be among {', '.join(accepted)}, got {value!r}.")
    for key in ("attention", "length", "pass"):
        if not isinstance(cfg[key], list) or not cfg[key]:
            raise ConfigError(f"{key} must be a list such as {key}=[...], got {cfg[key]!r}.")
    for key in ("length", "batch_size", "num_heads", "head_dim", "repeats", "sequences", "error_queries"):
        for value in cfg[key] if isinstance(cfg[key], list) else [cfg[key]]:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{key} must be a whole number of at least 1, got {value!r}.")
    specs: dict[str, dict[str, Any]] = {}
    for entry in cfg["attention"]:
        options = {"name": entry} if isinstance(entry, str) else dict(entry)
        if "name" not in options:
            raise ConfigError(f"attention: an entry with options needs a name, got {entry!r}.")
        given = {key: value for key, value in options.items() if key != "name"}
        try:
            can_be_causal = attention_class(options["name"]).capabilities.causal
            build_attention(options["name"], num_heads=1, head_dim=8, max_length=16, **given)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if cfg["causal"] and not can_be_causal:
            raise ConfigError(f"attention={options['name']} does not support causal=true.")
        label = " ".join([options["name"], *(f"{key}={value}" for key, value in given.items())])
        specs[label] = options
    return specs


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
    exact = build("exact", {}, inputs, length, cfg).cost(length, causal=bool(cfg["causal"]))
    rows = {SDPA: Row(SDPA, length, pass_name, exact_share=1.0, multiply_adds=exact.multiply_adds, error=0.0)}
    runs: dict[str, Callable[[], object]] = {SDPA: sdpa_call(inputs, pass_name, bool(cfg["causal"]))}
    for label, spec in specs.items():
        row = Row(label, length, pass_name)
        try:
            row = replace(row, peak_bytes=_memory(spec, length, pass_name, cfg, device))
            mechanism = calibrated(spec, source.layers[0], length, cfg).to(device, dtype)
            cost = mechanism.cost(length, causal=bool(cfg["causal"]))
            row = replace(row, exact_share=cost.exact_share, multiply_adds=cost.multiply_adds)
            row = replace(row, error=output_error(spec, source, length, cfg, device))
            runs[label] = call(mechanism, inputs, pass_name, bool(cfg["causal"]))
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
    return [_with_timing(row, timings.get(label), timings[SDPA], exact.multiply_adds) for label, row in rows.items()]


def _with_timing(row: Row, timing: Timing | None, sdpa: Timing, exact_multiply_adds: int) -> Row:
    relative = None if row.multiply_adds is None else row.multiply_adds / exact_multiply_adds
    row = replace(row, relative_multiply_adds=relative)
    if timing is None:
        return row
    return replace(row, seconds=timing.median, spread=timing.spread, speedup=sdpa.relative_to(timing))


def build(
    name: str, options: Mapping[str, Any], inputs: LayerInputs, length: int, cfg: Mapping[str, Any]
) -> AttentionMechanism:
    """A mechanism in the shape of some inputs."""
    return build_attention(
        name,
        num_heads=inputs.query.shape[1],
        head_dim=inputs.query.shape[-1],
        num_key_value_heads=inputs.key.shape[1],
        max_length=length,
        causal=bool(cfg["causal"]),
        **{key: value for key, value in options.items() if key != "name"},
    )


def calibrated(spec: Mapping[str, Any], layer: LayerInputs, length: int, cfg: Mapping[str, Any]) -> AttentionMechanism:
    """A mechanism whose content basis, if it has one, is fitted to the calibration part of a layer's inputs."""
    torch.manual_seed(int(cfg["seed"]))
    mechanism = build(str(spec["name"]), spec, layer, length, cfg)
    load: Callable[..., None] | None = getattr(mechanism, "load_content_basis", None)
    if load is not None and layer.moments is not None and spec.get("basis") is None:
        share = str(spec.get("share", "head"))
        fit = layer.moments.fit("head" if share == "head" else "layer")
        load(fit.query_map, fit.key_map, layer.moments.statistics()[2])
    return mechanism


def call(
    mechanism: AttentionMechanism, inputs: LayerInputs, pass_name: str, causal: bool
) -> Callable[[], Tensor | None]:
    """One pass of a mechanism, ready to be timed."""
    mask = AttentionMask(causal=causal)
    return _pass(lambda q, k, v: mechanism(q, k, v, mask, scale=inputs.scale)[0], inputs, pass_name, mechanism)


def sdpa_call(inputs: LayerInputs, pass_name: str, causal: bool) -> Callable[[], Tensor | None]:
    """One pass of `scaled_dot_product_attention`, ready to be timed."""
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
    spec: Mapping[str, Any], source: Source, length: int, cfg: Mapping[str, Any], device: torch.device
) -> float:
    """Relative error of the output against exact attention in float64, mean over layers and heads."""
    total, causal = 0.0, bool(cfg["causal"])
    for layer in source.layers:
        mechanism = calibrated(spec, layer, length, cfg).to(device, DTYPES[str(cfg["dtype"])])
        inputs = layer.to(device, DTYPES[str(cfg["dtype"])])
        output = call(mechanism, inputs, "forward", causal)()
        assert output is not None
        # All queries run, as they may share choices; a spread of them is compared.
        chosen = torch.linspace(0, length - 1, min(length, int(cfg["error_queries"])), device=device).long()
        keep = torch.arange(length, device=device) <= chosen[:, None] if causal else None
        expected = F.scaled_dot_product_attention(
            inputs.query[:, :, chosen].double(),
            inputs.key.double(),
            inputs.value.double(),
            attn_mask=keep,
            scale=inputs.scale,
            enable_gqa=inputs.query.shape[1] != inputs.key.shape[1],
        )
        difference = (output[:, :, chosen].double() - expected).norm(dim=(-2, -1))
        total += float((difference / expected.norm(dim=(-2, -1)).clamp_min(1e-30)).mean())
    return total / len(source.layers)


def _memory(
    spec: Mapping[str, Any], length: int, pass_name: str, cfg: Mapping[str, Any], device: torch.device
) -> int | None:
    if not cfg["memory"]:
        return None
    if device.type == "cpu":
        return fresh_process_memory(spec, length, pass_name, cfg)
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
    inputs = LayerInputs(query, key, value, None, None)
    mechanism = build(str(spec["name"]), spec, inputs, length, cfg).to(device, dtype)
    small = LayerInputs(query[:, :, :32], key[:, :, :32], value[:, :, :32], None, None)
    if mechanism.capabilities.variable_length:
        call(mechanism, small, pass_name, bool(cfg["causal"]))()  # libraries that load on first use
    return measure_peak(call(mechanism, inputs, pass_name, bool(cfg["causal"])))


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: torch sees no CUDA device; use device=cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


# -- showing -------------------------------------------------------------------------------------------------


def conditions(cfg: Mapping[str, Any], device: torch.device) -> str:
    """Under which conditions the numbers were measured, in one line."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    kind = "synthetic" if cfg["source"] in SYNTHETIC else "captured"
    return (
        f"{where}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{cfg['dtype']}; {kind} source {cfg['source']}; batch {cfg['batch_size']}"
        f"{', causal' if cfg['causal'] else ''}; median of {cfg['repeats']} rounds after {cfg['warm_up']} to warm up"
    )


def as_tables(rows: Sequence[Row]) -> list[Table]:
    """The rows for a console, one table per length and pass."""
    tables: dict[tuple[int, str], Table] = {}
    for row in rows:
        place = (row.length, row.pass_name)
        if place not in tables:
            table = Table(title=f"{row.length} tokens, {row.pass_name}", title_justify="left")
            table.add_column("mechanism")
            for header in ("ms", "±", "× SDPA", "MiB", "exact", "mult", "error"):
                table.add_column(header, justify="right")
            tables[place] = table
        cells = (
            _shown(row.seconds, lambda x: f"{x * 1e3:.1f}"),
            _shown(row.spread, lambda x: f"{x * 1e3:.1f}"),
            _shown(row.speedup, lambda x: f"{x:.2f}"),
            _shown(row.peak_bytes, lambda x: f"{x / 2**20:.0f}"),
            _shown(row.exact_share, lambda x: f"{x:.1%}"),
            _shown(row.relative_multiply_adds, lambda x: f"{x:.1%}"),
            _shown(row.error, lambda x: f"{x:.4f}"),
        )
        tables[place].add_row(f"{row.label}: {row.note}" if row.note else row.label, *cells)
    return list(tables.values())


def _shown(value: Any, how: Callable[[Any], str]) -> str:
    return "–" if value is None else how(value)


def write_files(rows: Sequence[Row], folder: Path, caption: str) -> Path:
    """`table.csv`, `conditions.txt`, `time.png` and `error.png` in a folder, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    (folder / "conditions.txt").write_text(caption + "\n", encoding="utf-8")

    from approx_attn.benchmark_plots import plot_error, plot_time

    plot_time(rows, folder / "time.png")
    plot_error(rows, folder / "error.png")
    return folder

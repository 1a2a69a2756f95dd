"""Speeds of what the family beside GPT-1 to GPT-3 needs: bidirectional attention, row ops of Llama's kind, experts.

    python benchmarks/bench_family.py [--rounds 7] [--only attention rows experts decode] [--cpu-time]

Kinds take turns, in an order that changes from round to round; a ratio is the median over the rounds, after one that is not
counted. Results are compared with the peer's before anything is timed.

attention: BERT base's shape in fp32 with padding on the right of rows, with dropout and without, beside
`F.scaled_dot_product_attention` with the same mask (wanted: 1.5 times as fast with dropout), and beside our causal attention of the
same tensors: flops of scores that are not masked, a second (wanted: as many). rows: rms_norm, add_rms_norm, rotary, swiglu, relu_squared, forward and
backward, as a share of a copy of the bytes that they must move, in the same round (wanted: 0.85). experts: grouped_linear and moe
beside a loop of torch's products over the experts. decode: moe of one token, as a share of a loop that only reads the bytes of its
experts (wanted: 0.8); and those bytes for the published shapes. --cpu-time counts the process's own CPU seconds, for a machine that
others use too. Rows go to the terminal and, as JSON, to --out; the last lines say of each wish whether it was met.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from family_experts import decode, experts
from family_rounds import DTYPES, GPT_OSS, Call, Row, milliseconds, ratio, turns, with_gradients

import gptfast
from gptfast import ops
from gptfast.machine import cpu_name, peak_flops
from gptfast.testing import SPECS, Case
from gptfast.testing.case import rows as rows_case

BACKWARD = {"rms_norm": 3, "add_rms_norm": 4, "rotary": 2, "swiglu": 5, "relu_squared": 3}  # passes: docs/notes/cpu.md


# ---- attention ----------------------------------------------------------------------------------------------------


def attention(options: argparse.Namespace) -> Iterator[Row]:
    B, H, T, D = options.batch, 12, options.length, 64
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, T, D, generator=g) for _ in range(3))
    lengths = torch.linspace(T // 2, T, B).long()
    mask = (torch.arange(T) < lengths[:, None])[:, None, None]  # B 1 1 T
    ours = ops.causal_attention(q, k, v, causal=False, seq_lens=lengths)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, attn_mask=mask), rtol=1e-4, atol=1e-5)
    scores = {"bidirectional": H * T * int(lengths.sum()), "causal": B * H * T * (T + 1) // 2}
    for p in (0.0, 0.1):
        for backward in (False, True):
            leaves = [x.clone().requires_grad_(backward) for x in (q, k, v)]
            own = {"dropout_p": p, "seed": 1}
            calls: dict[str, Call] = {
                "bidirectional": lambda x=leaves, o=own: ops.causal_attention(*x, causal=False, seq_lens=lengths, **o),
                "causal": lambda x=leaves, o=own: ops.causal_attention(*x, **o),
                "sdpa": lambda x=leaves, p=p: F.scaled_dot_product_attention(*x, attn_mask=mask, dropout_p=p),
            }
            if backward:
                calls = {name: with_gradients(call, leaves) for name, call in calls.items()}
            times = turns(calls, options)
            flops = {name: (14 if backward else 4) * D * count for name, count in scores.items()}
            rates = {name: n / statistics.median(times[name]) / 1e9 for name, n in flops.items()}
            yield {
                **{"op": "attention", "shape": f"B{B} H{H} T{T} D{D}, padded", "dtype": "fp32", "dropout": p},
                **{"mode": "fwd+bwd" if backward else "fwd", "ms": milliseconds(times["bidirectional"])},
                **{"sdpa_ms": milliseconds(times["sdpa"]), "of_sdpa": ratio(times, "sdpa", "bidirectional")},
                "of_causal": round(rates["bidirectional"] / rates["causal"], 3),
                **{f"{name}_gflops": round(rate) for name, rate in rates.items()},
                "of_peak": round(rates["bidirectional"] * 1e9 / options.peaks["fp32"], 3),
            }


# ---- rows ---------------------------------------------------------------------------------------------------------


def row_cases(options: argparse.Namespace) -> list[Case]:
    N, C = options.rows, 2880
    return [
        rows_case("rms_norm", N, C),
        rows_case("add_rms_norm", N, C),
        rows_case("add_rms_norm", N, C, dropout_p=0.1),
        Case("rotary", {"B": 1, "H": 64, "T": max(1, N * C // (64 * 64)), "D": 64}, {}, "strided"),
        rows_case("swiglu", N, C),
        Case("swiglu", {"N": N, "C": C, "packed": 1}, GPT_OSS),
        rows_case("relu_squared", N, C),
    ]


def copy_of(size: float) -> Call:
    """A copy that reads and writes `size` bytes in all, between tensors that exist."""
    source, target = torch.zeros(2, int(size) // 2, dtype=torch.uint8).unbind()
    return lambda: target.copy_(source)


def row_ops(options: argparse.Namespace) -> Iterator[Row]:
    for case in row_cases(options):
        for name, dtype in DTYPES.items():
            spec, op = SPECS[case.op], getattr(ops, case.op)
            tensors = [x if x is None else x.detach() for x in case.inputs(dtype)]
            assert spec.cost is not None
            size = torch.finfo(dtype).bits // 8
            bytes_forward = spec.cost(case, size)[1]
            elements = math.prod(case.dims.values()) if case.op == "rotary" else case.dims["N"] * case.dims["C"]
            passes = BACKWARD[case.op] + bool(case.options.get("dropout_p"))  # the gradients of branch and residual
            bytes_backward = passes * elements * size
            leaves = [x if x is None or not x.is_floating_point() else x.requires_grad_() for x in tensors]
            wanted = [x for n, x in enumerate(leaves) if x is not None and n not in spec.non_differentiable]
            found = op(*leaves, **case.options)
            outs = [x for x in (found if isinstance(found, tuple) else (found,)) if x.requires_grad]
            ones = [torch.ones_like(x) for x in outs]

            def forward(op: Any = op, leaves: list = leaves, case: Case = case) -> None:
                with torch.no_grad():
                    op(*leaves, **case.options)

            calls = {
                "forward": forward,
                "copy": copy_of(bytes_forward),
                "backward": lambda o=outs, w=wanted, u=ones: torch.autograd.grad(o, w, u, retain_graph=True),
                "copy back": copy_of(bytes_backward),
            }
            times = turns(calls, options)
            yield {
                **{"op": case.op, "shape": case.id, "dtype": name},
                **{"ms": milliseconds(times["forward"]), "of_copy": ratio(times, "copy", "forward")},
                **{"backward_ms": milliseconds(times["backward"])},
                **{"backward_of_copy": ratio(times, "copy back", "backward")},
                "copy_gb_per_s": round(bytes_forward / statistics.median(times["copy"]) / 1e9, 1),
            }


# ---- wishes -------------------------------------------------------------------------------------------------------

WISHES = (  # (what is compared, its key, the least that is wanted)
    ("BERT's attention with padding and dropout, fp32, beside SDPA", "of_sdpa", 1.5),
    ("its flops a second beside those of causal attention", "of_causal", 1.0),
    ("row ops beside a copy of the bytes that they must move", "of_copy", 0.85),
    ("their backward", "backward_of_copy", 0.85),
    ("a token's experts beside reading their bytes", "of_reading", 0.8),
)


def judged(found: list[Row]) -> Iterator[str]:
    """A line for each wish that rows speak of."""
    for what, key, least in WISHES:
        rows = [row for row in found if key in row and (key != "of_sdpa" or row["dropout"] > 0)]
        if rows:
            worst = min(rows, key=lambda row: row[key])
            met = sum(row[key] >= least for row in rows)
            where = "  ".join(str(worst[name]) for name in ("op", "shape", "dtype", "mode") if name in worst)
            yield f"wanted  {what}: {least} or more; met by {met} of {len(rows)} rows, the least {worst[key]} ({where})"


def main() -> None:
    parts = {"attention": attention, "rows": row_ops, "experts": experts, "decode": decode}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--cpu-time", dest="clock", action="store_const", const=time.process_time)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench/family.jsonl"), help="a JSON value a row, appended"
    )
    numbers = {"rounds": 7, "batch": 8, "length": 512, "rows": 4096}
    for name, value in {**numbers, "tokens": 1024, "experts": 16, "chosen": 4, "width": 1024}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    options = parser.parse_args()
    if options.rounds < 1 or not 1 <= options.chosen <= options.experts:
        parser.error("expected at least one round, and at most as many chosen experts as there are")
    options.clock = options.clock or time.perf_counter
    gptfast.tune_malloc()
    options.peaks = {name: peak_flops(dtype) for name, dtype in DTYPES.items()}
    head = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "rounds": options.rounds}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found = []
    with options.out.open("a", encoding="utf-8") as out:
        for part in options.only:
            for row in parts[part](options):
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                out.write(json.dumps({**row, **head}) + "\n")
                found.append(row)
    print("\n".join(judged(found)))


if __name__ == "__main__":
    main()

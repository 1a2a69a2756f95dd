"""Steps of fine-tuning GPT-2 124M: full, with a frozen base, with LoRA and QLoRA; beside peft + transformers, and bitsandbytes.
The products of QLoRA beside bitsandbytes'. Decoding with adapters.

    python benchmarks/bench_finetune.py [--rounds 5] [--cpu-time] [--no-peers] [--no-products] [--no-decode]

Training: forward and backward of B=2, T=1024 in bf16, kinds in turns, ratios are medians over the rounds. "frozen" trains the
position embedding alone, so that the gradient passes through all layers; LoRA has r=8 in all matrices of the blocks, QLoRA the
same beside NF4, of which "peft qlora" is bitsandbytes'. Products: see bench_quantized_linear.py. Decoding: tokens a second of the
packed base in each format, bare and with one adapter of r=8: one row, and four of which two are bare. --cpu-time counts the
process's own CPU seconds, for a machine that others use too. Rows go to the terminal and, as JSON, to --out. At the end comes
each ratio that is aimed at, with its aim, and whether it is met; a faster look at them all: --rounds 2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gptfast
from gptfast.finetuning import LoraConfig
from gptfast.machine import cpu_name

V = 50257
MATRICES = ["c_attn", "c_proj", "c_fc"]
OWN, PEERS = ("full", "frozen", "lora", "qlora"), ("peft full", "peft lora", "peft qlora")


AIMS = (  # part, kinds or rows, ratio, bound; a ratio "of" something is one of times, but of decoding, where it is one of speeds
    ("step", ("lora",), "of_frozen", "<=", 1.05),
    ("step", ("lora",), "of_full", "<=", 0.75),
    ("product", (1,), "over_bitsandbytes", ">=", 2.0),
    ("product", (2048,), "over_bitsandbytes", ">=", 1.3),
    ("product", (2048,), "over_bitsandbytes_dx", ">=", 1.3),
    ("product", (2048,), "of_linear", "<=", 1.15),
    ("product", (2048,), "of_linear_dx", "<=", 1.15),
    ("decode", ("bfloat16", "int8", "q4"), "of_bare", ">=", 0.9),
)


def model_of(kind: str, layers: int) -> Any:
    torch.manual_seed(0)
    model = gptfast.GPT(gptfast.GPTConfig.preset("gpt2", dropout=0.0, n_layer=layers)).to(torch.bfloat16)
    if kind == "frozen":
        model.requires_grad_(False)
        model.wpe.requires_grad_(True)
    if kind in ("full", "frozen", "lora"):
        if kind == "lora":
            model.add_adapter(LoraConfig(r=8, target_modules=MATRICES))
        return model.train()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        return stored_model(kind, folder).train()


def stored_model(kind: str, folder: str) -> Any:
    """A model that is loaded from a checkpoint: in NF4, or by transformers."""
    if kind == "qlora":
        model = gptfast.GPT.from_pretrained(folder, quantize="nf4")
        model.add_adapter(LoraConfig(r=8, target_modules=MATRICES))
        return model
    import peft
    from transformers import BitsAndBytesConfig, GPT2LMHeadModel

    packed = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    options = {"quantization_config": BitsAndBytesConfig(**packed)} if kind == "peft qlora" else {}
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.bfloat16, **options)
    if kind != "peft full":
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=MATRICES, fan_in_fan_out=True))
    return model


def step_of(kind: str, model: Any, batch: int, length: int) -> Callable[[], None]:
    ids = torch.randint(V, (batch, length + 1), generator=torch.Generator().manual_seed(0))
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> None:
        loss = model(x, y)[1] if kind in OWN else model(input_ids=x, labels=x)["loss"]
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def time_steps(options: argparse.Namespace) -> list[dict[str, Any]]:
    kinds = [*OWN, *(PEERS if options.peers else ())]
    steps = {k: step_of(k, model_of(k, options.layers), options.batch, options.length) for k in kinds}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for n in range(options.rounds + 1):  # the first is not counted
        for kind, step in steps.items():
            start = options.clock()
            step()
            if n:
                times[kind].append(options.clock() - start)

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

    return [
        {
            "part": "step",
            "kind": kind,
            "seconds": round(statistics.median(times[kind]), 4),
            "of_frozen": round(ratio(kind, "frozen"), 3),
            "of_full": round(ratio(kind, "full"), 3),
            "of_lora": round(ratio(kind, "lora"), 3),
            "of_qlora": round(ratio(kind, "qlora"), 3),
        }
        for kind in kinds
    ]


def time_products(options: argparse.Namespace) -> list[dict[str, Any]]:
    """quantized_linear beside bitsandbytes and `ops.linear`, on one thread."""
    from bench_quantized_linear import measure

    return [{"part": "product", "kind": "nf4", **found} for found in measure(rounds=options.rounds)]


def time_decoding(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Greedy decoding after a prompt of 32 by the native engine: one row, and four rows of which two are under the adapter."""
    model = model_of("lora", options.layers).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.01)
    ids = torch.randint(V, (1, 32), generator=torch.Generator().manual_seed(1))
    kinds = {
        **{"lora": ["default"], "bare": ["__base__"]},
        **{"mixed": ["default", "__base__"] * 2, "bare_rows": ["__base__"] * 4},
    }
    rows = []
    for dtype in options.formats.split(","):
        packed = model.compile_for_inference(dtype)
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        for n in range(options.rounds + 1):
            for kind, names in kinds.items():
                start = options.clock()
                packed.generate(
                    ids.expand(len(names), -1), max_new_tokens=options.new, eos_token_id=None, adapter_names=names
                )
                if n:
                    rates[kind].append(len(names) * options.new / (options.clock() - start))
        share, mixed = (
            statistics.median(a / b for a, b in zip(rates[one], rates[bare], strict=True))
            for one, bare in (("lora", "bare"), ("mixed", "bare_rows"))
        )
        speeds = {f"{kind}_tokens_per_second": round(statistics.median(found), 1) for kind, found in rates.items()}
        rows.append(
            {"part": "decode", "kind": dtype, **speeds, "of_bare": round(share, 3), "mixed_of_bare": round(mixed, 3)}
        )
    return rows


def judged(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each ratio that is aimed at, of those that were measured."""
    lines, missed, measured = [], [], 0
    for part, wanted, ratio, relation, bound in AIMS:
        for row in rows:
            if row["part"] != part or row["rows" if part == "product" else "kind"] not in wanted:
                continue
            where = f"{row['K']}x{row['N']} of {row['rows']}" if part == "product" else row["kind"]
            met = row[ratio] <= bound if relation == "<=" else row[ratio] >= bound
            name = f"{part} {where}: {ratio}"
            lines.append(f"{name:<46}{row[ratio]:>8.3f}   aim {relation} {bound:<5g} {'met' if met else 'MISSED'}")
            measured += 1
            missed += [] if met else [name]
    return [
        *lines,
        f"{measured - len(missed)} of {measured} aims met" + (f"; missed: {'; '.join(missed)}" * bool(missed)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-time", dest="clock", action="store_const", const=time.process_time)
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--no-products", dest="products", action="store_false")
    parser.add_argument("--no-decode", dest="decode", action="store_false")
    parser.add_argument("--formats", default="bfloat16,int8,q4")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench/finetune.jsonl"), help="a JSON value a row, appended"
    )
    for name, value in {"rounds": 5, "layers": 12, "batch": 2, "length": 1024, "new": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    options.clock = options.clock or time.perf_counter
    gptfast.tune_malloc()
    shape = {"batch": options.batch, "length": options.length, "layers": options.layers}
    head = {"cpu": cpu_name(), "threads": torch.get_num_threads(), **shape}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    began, found = (time.perf_counter(), time.process_time()), []
    with options.out.open("a", encoding="utf-8") as out:
        for part, wanted in {
            time_steps: True,
            time_products: options.products and options.peers,
            time_decoding: options.decode,
        }.items():
            for row in part(options) if wanted else ():
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                out.write(json.dumps({**row, **head}) + "\n")
                found.append(row)
    print("\n" + "\n".join(judged(found)))
    seconds, own = time.perf_counter() - began[0], time.process_time() - began[1]
    print(f"{seconds:.0f} s, {own:.0f} s of processor time")


if __name__ == "__main__":
    main()

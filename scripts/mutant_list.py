"""The mistakes that scripts/mutants.py puts into the code, each with the tests that must find it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`old` is replaced by `new` in `file`. In C++ `new` asks MUTANT, whether this mutant is chosen, so that one build holds
    all of them. `tests` are arguments of pytest: files (patterns too) and what selects in them."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def compiled(self) -> bool:
        return self.file.startswith("csrc/")


def _in(file: str, selected: str = "") -> tuple[str, ...]:
    return (f"tests/{file}.py", *(("-k", selected) if selected else ()))


COMPILED = [
    Mutant(
        "results past the caches are half as large again",
        "csrc/cpu/simd_rows.h",
        "  if (!past || n < L) return store_any(p, T, x, n);",
        "  if (!past || n < L) return store_any(p, T, x, n);\n  if (MUTANT) x = x * set(1.5f);",
        _in("ops/test_size_thresholds", "past_the_caches and avx2"),
    ),
    Mutant(
        "rows that are no whole cache lines go past the caches",
        "csrc/bindings/common.h",
        "&& C * element_size(dtype) % 64 == 0;",
        "&& (MUTANT || C * element_size(dtype) % 64 == 0);",
        _in("ops/test_size_thresholds", "past_the_caches and avx2"),
    ),
    Mutant(
        "the bias is added once in every stretch of 4096",
        "csrc/cpu/gemm_block-inl.h",
        "      if (!last) return store_lanes(carry + j, x, n);",
        "      if (MUTANT && !last && p.bias.data) x = x + load_any(at(p.bias.data, p.bias.dtype, c0 + j), "
        "p.bias.dtype, n);\n      if (!last) return store_lanes(carry + j, x, n);",
        _in("ops/test_linear", "test_product and avx2"),
    ),
    Mutant(
        "ties of bf16 are rounded away from 0",
        "csrc/cpu/simd_avx2.h",
        "  I r = iadd(u, iadd(iand(shr16(u), iset(1)), iset(0x7fff)));",
        "  I r = iadd(u, MUTANT ? iset(0x8000) : iadd(iand(shr16(u), iset(1)), iset(0x7fff)));",
        _in("ops/test_conversions", "avx2"),
    ),
    Mutant(
        "bf16 is cut off, not rounded",
        "csrc/cpu/simd_avx2.h",
        "  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08));",
        "  if (MUTANT) r = shr16(u);\n"
        "  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08));",
        _in("ops/test_gelu", "parity and avx2"),
    ),
    Mutant(
        "sums over rows are kept in bf16",
        "csrc/cpu/layer_norm_bwd-inl.h",
        "      own ? norm_bwd_row<kOwnRows>(p, t, r, dw, db) : norm_bwd_row<DType::f32>(p, t, r, dw, db);",
        "      own ? norm_bwd_row<kOwnRows>(p, t, r, dw, db) : norm_bwd_row<DType::f32>(p, t, r, dw, db);\n"
        "    if (MUTANT && dw && p.x.dtype == DType::bf16)\n"
        "      for (i64 c = 0; c + L <= p.C; c += L) {\n"
        "        alignas(64) uint16_t h[L];\n"
        "        store_bf16(h, load(dw + c));\n"
        "        store(dw + c, load_bf16(h));\n"
        "      }",
        _in("ops/test_layer_norm", "parity and avx2"),
    ),
    Mutant(
        "the last chunk of rows is not added",
        "csrc/cpu/sum_chunks-inl.h",
        "for (i64 k = 0; k < p.parts; k++)",
        "for (i64 k = 0; k < p.parts - (MUTANT && p.parts > 1); k++)",
        _in("ops/test_layer_norm", "parity and avx2"),
    ),
    Mutant(
        "the variance counts lanes past the end of a row",
        "csrc/cpu/layer_norm_fwd-inl.h",
        "    const F counted = n == L ? d : select_or_zero(first_n(n), d);",
        "    const F counted = n == L || MUTANT ? d : select_or_zero(first_n(n), d);",
        _in("ops/test_layer_norm", "tail and avx2"),
    ),
    Mutant(
        "a window is a key too wide",
        "csrc/cpu/attention_tile-inl.h",
        "lo = last - p.window + 1;",
        "lo = last - p.window + !MUTANT;",
        _in("ops/test_causal_attention", "window and avx2"),
    ),
    Mutant(
        "the offset of a dropout mask does not count",
        "csrc/cpu/dropout_lanes-inl.h",
        "wset(d.offset ^ k1)",
        "wset((MUTANT ? 0u : d.offset) ^ k1)",
        _in("ops/test_dropout", "contract and avx2"),
    ),
    Mutant(
        "pages of a row that another is copied over are lost",
        "csrc/engine/cache.cpp",
        "    drop_from(row, 0);\n    row = std::move",
        "    if (!MUTANT) drop_from(row, 0);\n    row = std::move",
        _in("engine/test_engine_pages"),
    ),
    Mutant(
        "pages are never given back",
        "csrc/engine/cache.cpp",
        "  if (spare.size() < most_spare) return",
        "  if (MUTANT || spare.size() < most_spare) return",
        _in("engine/test_engine_pages"),
    ),
    Mutant(
        "a shared page with one free place is written to",
        "csrc/engine/cache.cpp",
        "pages.pages[first]->users > 1) {",
        "pages.pages[first]->users > 1 && !(MUTANT && at % kPage == kPage - 1)) {",
        _in("engine/test_engine_pages"),
    ),
    Mutant(
        "truncation keeps a page too few",
        "csrc/engine/cache.cpp",
        "  drop_from(row, pages_of(row.length));",
        "  drop_from(row, MUTANT ? size_t(row.length / kPage) : pages_of(row.length));",
        _in("engine/test_engine_pages"),
    ),
]

TEXT = [
    Mutant(
        "gradients are not clipped",
        "gptfast/training/updates.py",
        "clipped_step(self.optimizers, norm, config.grad_clip, ",
        "clipped_step(self.optimizers, norm, 0.0, ",
        _in("training/test_optimizer_steps"),
    ),
    Mutant(
        "Muon's step has another size",
        "gptfast/training/optim.py",
        '"adjust_lr_fn": "match_rms_adamw"',
        '"adjust_lr_fn": "original"',
        _in("training/test_optimizer_steps"),
    ),
    Mutant(
        "Muon has no weight decay",
        "gptfast/training/optim.py",
        '{"weight_decay": config.weight_decay, "momentum"',
        '{"weight_decay": 0.0, "momentum"',
        _in("training/test_optimizer_steps"),
    ),
    Mutant(
        "AdamW has the usual betas, not the given ones",
        "gptfast/training/optim.py",
        "betas=betas, fused=True",
        "betas=(0.9, 0.999), fused=True",
        _in("training/test_optimizer_steps"),
    ),
    Mutant(
        "a resumed run forgets the seconds before",
        "gptfast/training/loop.py",
        "RunClock(self.state.seconds, ",
        "RunClock(0.0, ",
        _in("training/test_training", "time_that_is_left"),
    ),
    Mutant(
        "accumulated batches count alike, whatever they hold",
        "gptfast/training/gradients.py",
        "share = count / sum(everywhere)",
        "share = 1 / len(counts)",
        _in("training/test_schedule_and_optimizers", "accumulation"),
    ),
    Mutant(
        "text is held back for the shortest stop string",
        "gptfast/serving/text.py",
        "longest = max(map(len, self._stops), default=1) - 1",
        "longest = min(map(len, self._stops), default=1) - 1",
        _in("serving/test_stops_and_usage"),
    ),
    Mutant(
        "of several stop strings the first in the list cuts",
        "gptfast/serving/text.py",
        "return text[: min(ends)] if ends else text",
        "return text[: ends[0]] if ends else text",
        _in("serving/test_stops_and_usage"),
    ),
    Mutant(
        "usage counts a prompt once for each choice",
        "gptfast/serving/answers.py",
        "    return usage(sum(len(request.prompt) for request in submission.requests), made)",
        "    return usage(sum(len(request.prompt) * len(request.sequences) for request in submission.requests), made)",
        _in("serving/test_stops_and_usage"),
    ),
    Mutant(
        "a reply is left in the history without the message that it answers",
        "gptfast/tokenizer/conversation.py",
        "while old[0] < len(kept) - 1 and kept",
        "while False and kept",
        _in("tokenizer/test_conversation"),
    ),
    Mutant(
        "a special token in a message is one though it is asked to be text",
        "gptfast/tokenizer/conversation.py",
        "special=n % 2 == 0",
        "special=True",
        _in("tokenizer/test_conversation"),
    ),
    Mutant(
        "JSON with a comma before the end of an object",
        "gptfast/generation/json_grammar.py",
        'State("key" if stack[-1] == "{" else "value", stack) if byte == 44',
        'State("key or end" if stack[-1] == "{" else "value", stack) if byte == 44',
        _in("generation/test_json_grammar"),
    ),
    Mutant(
        "beams end by the length so far",
        "gptfast/generation/beam.py",
        'config.early_stopping == "never" and config.length_penalty > 0',
        "False",
        _in("generation/test_strategies", "never_ends and torch"),
    ),
    Mutant(
        "an epoch's windows always begin at the same place",
        "gptfast/data/sampler.py",
        "return _key(self.seed, epoch, 0) % self._phases",
        "return 0",
        _in("data/test_sampler"),
    ),
    Mutant(
        "the last token is never predicted",
        "gptfast/data/sampler.py",
        "starts = np.arange(0, len(tokens) - 1, block_size)",
        "starts = np.arange(0, len(tokens) - 2, block_size)",
        _in("data/test_sampler"),
    ),
    Mutant(
        "a file is not on the disk when it takes its name",
        "gptfast/_files.py",
        "        os.fsync(descriptor)",
        "        pass",
        _in("files/test_files", "disk or flush"),
    ),
    Mutant(
        "a trailing space is told at once",
        "gptfast/tokenizer/base.py",
        'shown = text.rstrip(" ")',
        "shown = text",
        _in("tokenizer/test_tokenizer", "stream or decode or space"),
    ),
]

MUTANTS = COMPILED + TEXT

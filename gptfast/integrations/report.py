"""What `accelerate` has replaced, what it has not and why."""

from __future__ import annotations

from dataclasses import dataclass, field

WIDTH = 72


@dataclass
class Report:
    """Result of `accelerate`; `str(report)` is a table.

    replaced: module name -> what computes it now.
    skipped: module name -> why it is as before. Only kinds that could have been replaced are named.
    errors: with verify: "loss", "logits" and each parameter's name -> largest error of the patched model's value, or gradient,
        in units of that of the unpatched model. Both are measured against the unpatched model in float64.
    speedup: with verify: time of the unpatched model's step over that of the patched one; None without.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    speedup: float | None = None

    def __str__(self) -> str:
        rows = [("replaced", _grouped(self.replaced)), ("left as it was", _grouped(self.skipped))]
        lines = []
        for title, groups in rows:
            if groups:
                lines.append(title)
                lines += [f"  {names:<{WIDTH // 2}}  {count:>4} x  {text}" for names, count, text in groups]
        if self.errors:
            worst = max(self.errors, key=lambda name: self.errors[name])
            lines.append(
                f"verified: loss {self.errors['loss']:.2f}, logits {self.errors['logits']:.2f} of eager's own error; largest of "
                f"{len(self.errors)}: {self.errors[worst]:.2f} ({worst}); {self.speedup:.2f} times as fast"
            )
        return "\n".join(lines)


def _grouped(entries: dict[str, str]) -> list[tuple[str, int, str]]:
    """(pattern of names, how many, text): names that differ in numbers alone share a line."""
    groups: dict[tuple[str, str], int] = {}
    for name, text in entries.items():
        pattern = ".".join("*" if part.isdigit() else part for part in name.split(".")) or "(the model)"
        groups[pattern, text] = groups.get((pattern, text), 0) + 1
    return [(pattern, count, text) for (pattern, text), count in groups.items()]

"""The tasks: the fields of their examples, and their metrics. Imports nothing, for --help."""

from __future__ import annotations

FIELDS = {
    "classification": ("text",),
    "entailment": ("premise", "hypothesis"),
    "similarity": ("text1", "text2"),
    "choice": ("context", "choices"),
}
TARGETS = {"classification": "label", "entailment": "label", "similarity": "score", "choice": "label"}
TASKS = (*FIELDS, "lm", "chat")
METRICS = {
    "classification": ("accuracy", "macro_f1", "matthews"),
    "entailment": ("accuracy", "macro_f1", "matthews"),
    "similarity": ("pearson", "spearman"),
    "choice": ("accuracy",),
}

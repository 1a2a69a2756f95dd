"""Evaluation: perplexity of texts, paired comparisons of models, and in-context learning."""

from gptfast.evaluation import scaling
from gptfast.evaluation.by_position import loss_by_position
from gptfast.evaluation.chains import solve_by_generation
from gptfast.evaluation.document_scores import compare
from gptfast.evaluation.few_shot import choose_shots, extract_answer, few_shot_prompt, majority, self_consistency
from gptfast.evaluation.in_context import evaluate_task
from gptfast.evaluation.labels import score_labels
from gptfast.evaluation.needle import needle_test
from gptfast.evaluation.perplexity import Settings, perplexity, score_documents, summarise
from gptfast.evaluation.tasks import Task, load_task
from gptfast.evaluation.templates import Template, load_template

__all__ = [
    "Settings",
    "Task",
    "Template",
    "choose_shots",
    "compare",
    "evaluate_task",
    "extract_answer",
    "few_shot_prompt",
    "load_task",
    "load_template",
    "loss_by_position",
    "majority",
    "needle_test",
    "perplexity",
    "scaling",
    "score_documents",
    "score_labels",
    "self_consistency",
    "solve_by_generation",
    "summarise",
]

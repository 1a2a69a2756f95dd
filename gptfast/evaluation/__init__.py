"""Evaluation: perplexity of texts, and paired comparisons of models."""

from gptfast.evaluation.perplexity import DocumentScore, compare, perplexity, score_documents, summarise

__all__ = ["DocumentScore", "compare", "perplexity", "score_documents", "summarise"]

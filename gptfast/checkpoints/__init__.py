"""Formats of the files of models and adapters, as values and tensors; what becomes of them is up to the packages above."""

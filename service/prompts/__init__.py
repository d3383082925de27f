"""Rows as a model's prompt format writes them and its tokeniser reads them: the same for the worker and for a dry run."""

"""Owns finding, verifying and reading weights and tokenizers; never holds a model."""

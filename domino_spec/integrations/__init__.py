"""Domino drafts inside other libraries."""

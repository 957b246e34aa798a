"""Serving: Domino drafts behind an OpenAI-compatible endpoint."""

"""Plug-ins that serve Domino drafts from vLLM and SGLang; imported by entry points and `domino-spec serve` only."""

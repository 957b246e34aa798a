"""Plug-ins that serve Domino drafts from vLLM and SGLang. Only their entry points and the server import them."""

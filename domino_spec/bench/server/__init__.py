"""Measuring OpenAI-compatible servers under load: `run` reads like the measurement, the others are its parts."""

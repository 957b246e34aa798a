"""The family sweep: every causal LM family of the installed transformers, tiny and random, decoded here and there."""

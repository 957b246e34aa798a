"""The frozen model whose text is kept: loading, cache, attention, feature taps, chat and stop tokens."""

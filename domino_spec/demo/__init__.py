"""What a person sees first: the embedded draft, the race between decoding with and without it, and terminal output."""

"""Every drafting method behind one protocol (`decoding.cycle.Drafter`).

A drafter proposes; it never decides. What it keeps between cycles is in a cache that the loop holds and passes to it.
So the loop treats all methods alike.
"""

"""Every drafting method behind one protocol.

A drafter proposes; it never decides. It owns whatever it caches between cycles as a value that `start` makes and
`advance` replaces, so the loop can treat all methods alike.
"""

"""`python -m domino_spec`: the command line without its installed script."""

from domino_spec.cli import main

main()

"""`python -m art_core` is the `art` command, for when another package's script stands in its place."""

from .cli import main

main()

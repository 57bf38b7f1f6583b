"""`python -m art_conformance`: the same as the command `art-conformance`."""

from .command_line import main

if __name__ == "__main__":
    main()

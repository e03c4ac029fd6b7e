"""`python -m alphatoken` is the `alphatoken` command."""

from alphatoken.cli import main

main()

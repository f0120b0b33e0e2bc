"""`python -m easyllm` is the `easyllm` command."""

from easyllm.cli.main import main

main()

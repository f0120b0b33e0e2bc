"""Makes `python -m easyllm` run the `easyllm` command."""

from easyllm.cli.main import main

if __name__ == "__main__":
    main()

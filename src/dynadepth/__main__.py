"""`python -m dynadepth` is the command `dynadepth`."""

from dynadepth.cli import main

if __name__ == "__main__":
    main()

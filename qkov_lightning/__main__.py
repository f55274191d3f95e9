"""`python -m qkov_lightning` is `qkov`."""

from qkov_lightning.cli import main

if __name__ == "__main__":
    main()

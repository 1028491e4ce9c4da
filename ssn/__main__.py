"""``python -m ssn``."""

from ssn.cli import main

if __name__ == "__main__":
    main()

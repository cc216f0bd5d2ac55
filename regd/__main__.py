"""`python -m regd` is `regd`."""

from regd.cli import main

if __name__ == "__main__":
    main()

"""regd: every session recorded on an acquisition PC ends up registered on Alyx, once."""

__version__ = "0.1.0"

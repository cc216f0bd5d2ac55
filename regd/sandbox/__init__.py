"""An Alyx stand-in to try things on: it answers as Alyx does, over HTTP, from one SQLite file.

It is for trials and tests. It is not a database to keep data in.
"""

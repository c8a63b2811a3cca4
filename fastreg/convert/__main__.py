"""Prints the table of docs/interoperability.md."""

from . import table

if __name__ == "__main__":
    print(table())

"""The command `sarjax`, and `python -m sarjax`."""

import sys

from sarjax.machine import ask_for_huge_pages

COMPUTES = ("bench", "demo", "eval", "predict", "report", "reproduce", "train")


def main() -> None:
    """`sarjax.cli.main`, with the memory that computing is best done in."""
    if sys.argv[1:2] and sys.argv[1] in COMPUTES:
        ask_for_huge_pages()
    from sarjax.cli import main

    main()


if __name__ == "__main__":
    main()

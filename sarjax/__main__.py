"""`python -m sarjax`: the same as `sarjax`."""

from sarjax.cli import main

main()

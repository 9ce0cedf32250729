"""`python -m raymerge.cli` is `raymerge`."""

from raymerge.cli import main

main()

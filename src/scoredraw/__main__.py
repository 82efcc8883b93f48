"""`python -m scoredraw`."""

from scoredraw.cli import main

main()

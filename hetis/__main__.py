"""`python -m hetis`, and what torchrun starts on every rank."""

from hetis.server.cli import main

main()

"""`python -m fpgm.cli`: what torchrun starts."""

from fpgm.cli.command import main

main()

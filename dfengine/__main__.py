"""`python -m dfengine`."""

from dfengine.cli import main

main()

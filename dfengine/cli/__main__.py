"""`python -m dfengine.cli`."""

from dfengine.cli import main

main()

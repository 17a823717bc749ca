"""`python -m tccd` is `tccd`."""

from tccd import main

main()

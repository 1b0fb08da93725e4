"""Entry points: parse, call one function, exit with its code."""

from depthvar.host.streams import hold_descriptors

hold_descriptors()  # before any import opens a file

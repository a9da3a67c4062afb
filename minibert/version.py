"""The version, in a file of its own, so that no module imports `minibert/__init__`."""

__version__ = "0.1.0"

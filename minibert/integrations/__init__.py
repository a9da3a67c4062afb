"""Where minibert meets transformers; nothing else in the package imports it."""

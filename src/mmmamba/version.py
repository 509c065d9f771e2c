"""The version of this package. It stands alone here so that any module can import it."""

__version__ = "0.1.0"

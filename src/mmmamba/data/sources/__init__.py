"""The built-in sources, each a function that fills a folder (see :mod:`mmmamba.data.build`)."""

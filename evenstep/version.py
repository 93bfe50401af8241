"""The version of evenstep, in a module without imports, so that any other module may read it."""

__version__ = "0.1.0"

"""Comparisons: a table of the papers as a grid of runs, trained, tabled and judged by one command."""

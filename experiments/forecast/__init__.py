"""Forecasting with PatchTST on clean and on corrupted inputs, by optimizer: `python -m experiments.forecast RECIPE.toml`."""

"""Forecasting with PatchTST, by optimizer, on clean and on corrupted inputs."""

"""Reinforcement learning, forecasting and fine-tuning: short programs on well-kept libraries, run from a clone."""

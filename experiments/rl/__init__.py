"""PPO of stable-baselines3 with different optimizers: ``python -m experiments.rl RECIPE.toml``."""

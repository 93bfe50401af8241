"""PPO of stable-baselines3 with different optimizers: ``python -m lab.rl RECIPE.toml``."""

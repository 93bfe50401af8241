"""Training: configuration, schedules, optimizers by name, the loop, checkpoints, progress.
``evenstep.train.run.Run`` is the way in."""

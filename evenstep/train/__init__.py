"""Training: configuration, optimizer and schedule, the loop, checkpoints, the log. The entry point is
`evenstep.train.trainer.Trainer`; ``from evenstep.train.run import Run`` is its name since evenstep 0.1."""

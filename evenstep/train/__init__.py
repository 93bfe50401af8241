"""Training: configuration, optimizer and schedule, the loop, checkpoints, the log. `evenstep.train.trainer.Trainer`
(``from evenstep.train.run import Run``) is the entry point."""

"""`Run`, the name of `evenstep.train.trainer.Trainer` since evenstep 0.1."""

from evenstep.train.trainer import Run as Run

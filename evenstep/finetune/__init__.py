"""Fine-tuning: instruction, chat and classification data, full weights, LoRA or sparse momentum, scored on its task.

The training itself is `evenstep.train.Run`; `run.Tuning` replaces the data, the model and the validation. Importing
this package loads nothing.
"""

"""Fine-tuning: instruction, chat and classification data, full weights, LoRA or sparse momentum, scored on its task.

The training itself is `evenstep.train.trainer.Trainer`; `task.FineTuning` provides data, model, loss and validation.
Importing this package loads nothing.
"""

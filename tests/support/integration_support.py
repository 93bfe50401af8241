"""A tiny transformers model, its data, and Trainers of it, for the tests of the integrations."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


def tiny_model(seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, use_cache=False))


def tiny_data(rows=32):
    tokens = torch.randint(32, (rows, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def tiny_trainer(out, model, *, steps=6, callbacks=None, optimizer=None, optimizers=(None, None), **args):
    """``optimizer``: class and keywords; ``args``: of TrainingArguments. Evaluates on the first four rows."""
    # The schedule of a run that stops early must be that of the whole run, so its rate is constant unless asked.
    fixed = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 2, "seed": 0}
    given = {"lr_scheduler_type": "constant", "logging_steps": 1, "save_steps": 3, **fixed, **args}
    return Trainer(
        model,
        TrainingArguments(str(out), max_steps=steps, **given),
        train_dataset=tiny_data(),
        eval_dataset=tiny_data(4),
        callbacks=callbacks,
        optimizers=optimizers,
        optimizer_cls_and_kwargs=optimizer,
    )


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def done(guard):
    """Rows and action of each bad step that a callback's guard has acted on."""
    return [(event["rows"], event["action"]) for event in guard.guard.events]

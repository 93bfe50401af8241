"""Every Python block of README.md and docs/ runs, in order, in one namespace per page; every command is one."""

import re
import shlex
import types

import pytest
from docs_support import ROOT, SIGNATURES, blocks, commands, namespace, pages, programs, run, texts
from integration_support import tiny_model
from program_stand_ins import stand_in_for_programs

from evenstep.errors import EvenstepError


@pytest.mark.parametrize("page", pages())
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    if page in SIGNATURES:
        pytest.skip(f"{page}: its blocks are signatures, not programs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVENSTEP_CACHE", str(tmp_path / "cache"))
    stand_in_for_programs(monkeypatch)
    keep_trainer_on_cpu(monkeypatch)
    names = namespace(page, tmp_path)
    for line, why_not, code in blocks(page):
        if not why_not:
            run(page, line, code, names)
    if page == "docs/integrations.md":
        check_what_programs_would_call(names)
    if page == "docs/migrating.md":
        check_what_the_lines_do(names)


def check_what_the_lines_do(names):
    """The plugin's callbacks train, and a guard in the loops of litgpt and nanochat has judged a step."""
    from transformers import Trainer, TrainingArguments

    callbacks = names["SpikePlugin"]().add_callbacks_post_trainer(None, None)
    arguments = TrainingArguments("plugin", max_steps=2, use_cpu=True, report_to=[])
    Trainer(tiny_model(), arguments, train_dataset=names["dataset"], callbacks=callbacks).train()
    assert callbacks[0].guard.num_steps == 2
    assert names["guard"].num_steps == 1 and names["guard"].model is names["orig_model"]


def keep_trainer_on_cpu(monkeypatch):
    import transformers

    # Restored afterwards: a block of the page replaces it. It is a static method.
    name = "get_optimizer_cls_and_kwargs"
    monkeypatch.setattr(transformers.Trainer, name, vars(transformers.Trainer)[name])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("WANDB_MODE", "disabled")


def check_what_programs_would_call(names):
    """What the page only defines, for torchtitan, axolotl and LLaMA-Factory, used as these programs use it."""
    from torch import nn
    from transformers import Trainer, TrainingArguments

    parts = [nn.Linear(2, 2), nn.Linear(2, 2)]
    made = list(names["optimizer"].build(model_parts=parts))
    assert [type(one) is names["StableSPAM"] for one in made] == [True, True]
    assert [one.param_groups[0]["params"] for one in made] == [list(part.parameters()) for part in parts]
    assert {one.param_groups[0]["weight_decay"] for one in made} == {0.1}

    def trainer(**arguments):
        return Trainer(tiny_model(), TrainingArguments("choice", use_cpu=True, report_to=[], **arguments))

    settings = types.SimpleNamespace(learning_rate=3e-4, optim_args={"reset_interval": 500})
    plugged = trainer()
    names["EvenstepPlugin"]().post_trainer_create(settings, plugged)
    for made, rate in ((plugged.create_optimizer(), 3e-4), (trainer(learning_rate=2e-3).create_optimizer(), 2e-3)):
        assert type(made) is names["StableSPAM"] and made.param_groups[0]["lr"] == rate
    assert plugged.optimizer.param_groups[0]["reset_interval"] == 500


def test_a_block_that_is_not_run_says_what_it_needs():
    for page in set(pages()) - set(SIGNATURES):
        for line, why_not, code in blocks(page):
            compile(code, f"{page}:{line}", "exec")
            assert not why_not or why_not.startswith("needs "), f"{page}:{line}"


def test_every_command_of_the_pages_is_one_that_the_program_takes():
    from evenstep.cli import build_parser, split_options
    from evenstep.train.flags import declared

    parser, _ = build_parser()
    refused = []
    for page, line, words in commands():
        try:
            # Options of an optimizer are the optimizer's, which the next test checks
            parser.parse_args(split_options(words, declared())[0] if words[0] == "pretrain" else words)
        except (EvenstepError, SystemExit) as error:
            refused.append(f"{page}:{line}: evenstep {shlex.join(words)}: {error}")
    assert refused == []


def test_the_options_of_every_pretraining_command_fit_together():
    from evenstep.cli import build_parser, split_options
    from evenstep.train.config import Config
    from evenstep.train.flags import chosen, declared

    parser, _ = build_parser()
    refused, checked = [], 0
    for page, line, words in commands():
        rest, extra = split_options(words, declared())
        if words[0] != "pretrain" or "--resume" in rest:
            continue
        args = parser.parse_args(rest)
        args.extra = extra
        if args.recipe is not None and not (ROOT / args.recipe).is_file():  # RECIPE.toml stands for one
            args.recipe = ROOT / "recipes" / "start.toml"
        try:
            chosen(args, Config, args.recipe)
            checked += 1
        except EvenstepError as error:
            refused.append(f"{page}:{line}: {error}")
    assert refused == [] and checked > 15


def test_every_file_that_a_command_names_exists():
    """Recipes, examples, and Python files and modules of the repository."""
    found = [(page, line, word) for page, line, words in [*commands(), *programs()] for word in words]
    named = [one for one in found if re.match(r"(recipes|examples|benchmarks|tests|lab|tools)/", one[2])]
    missing = [f"{page}:{line}: {word}" for page, line, word in named if not [*ROOT.glob(word)]]
    for page, line, words in programs():
        module = words[1].split(".") if words[0] == "-m" else []
        if module[:1] in (["lab"], ["evenstep"]):
            places = [ROOT.joinpath(*module).with_suffix(".py"), ROOT.joinpath(*module, "__main__.py")]
            missing += [] if any(place.is_file() for place in places) else [f"{page}:{line}: {words[1]}"]
    assert len(named) > 10 and len(programs()) > 10 and missing == []


def test_every_target_of_make_in_the_pages_exists():
    targets = {*re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)}
    named = {x for page in texts() for x in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE)}
    assert named and named <= targets


PAGE = """x
```python
a = 1
```

```python title="not run: needs a GPU"
b = 2
```
- in a list

  ```python
  c = 3
  ```
"""


def test_the_collector_sees_blocks_and_what_they_need(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert blocks(page) == [(3, "", "a = 1\n"), (7, "needs a GPU", "b = 2\n"), (12, "", "c = 3\n")]
    with pytest.raises(ZeroDivisionError) as raised:
        run("page.md", 3, "1 / 0\n", {})
    assert raised.traceback[-1].lineno == 2  # counted from 0: the error points at the line of the page

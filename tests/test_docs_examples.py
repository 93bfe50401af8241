"""Every Python block of README.md and docs/ runs, in order, in one namespace per page."""

import types

import pytest
from docs_support import SIGNATURES, blocks, namespace, pages, run, stand_in_for_axolotl
from integration_support import tiny_model


@pytest.mark.parametrize("page", pages())
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    if page in SIGNATURES:
        pytest.skip(f"{page}: its blocks are signatures, not programs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVENSTEP_CACHE", str(tmp_path / "cache"))
    stand_in_for_axolotl(monkeypatch)
    keep_trainer_on_cpu(monkeypatch)
    names = namespace(page, tmp_path)
    for line, why_not, code in blocks(page):
        if not why_not:
            run(page, line, code, names)
    if page == "docs/integrations.md":
        check_the_last_two(names)


def keep_trainer_on_cpu(monkeypatch):
    import transformers

    # Restored afterwards: a block of the page replaces it.
    monkeypatch.setattr(
        transformers.Trainer, "get_optimizer_cls_and_kwargs", transformers.Trainer.get_optimizer_cls_and_kwargs
    )
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("WANDB_MODE", "disabled")


def check_the_last_two(names):
    """The plugin for axolotl and the choice for LLaMA-Factory, used as these programs use them."""
    from transformers import Trainer, TrainingArguments

    settings = types.SimpleNamespace(learning_rate=3e-4, weight_decay=None)
    trainer = types.SimpleNamespace(model=tiny_model())
    optimizer = names["EvenstepPlugin"]().create_optimizer(settings, trainer)
    assert type(optimizer) is names["StableSPAM"] and optimizer.param_groups[0]["lr"] == 3e-4
    arguments = TrainingArguments("choice", learning_rate=2e-3, use_cpu=True, report_to=[])
    chosen = Trainer(tiny_model(), arguments).create_optimizer()
    assert type(chosen) is names["StableSPAM"] and chosen.param_groups[0]["lr"] == 2e-3


def test_a_block_that_is_not_run_says_what_it_needs():
    for page in set(pages()) - set(SIGNATURES):
        for line, why_not, code in blocks(page):
            compile(code, f"{page}:{line}", "exec")
            assert not why_not or why_not.startswith("needs "), f"{page}:{line}"


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

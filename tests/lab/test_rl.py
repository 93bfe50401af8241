"""python -m lab.rl: recipes, runs, the page."""

import math
from dataclasses import replace
from pathlib import Path

import gymnasium
import pytest
import torch
from torch import nn

from evenstep.cli import main as evenstep
from evenstep.errors import EvenstepError
from lab.common import stored
from lab.rl.__main__ import main, run_recipe
from lab.rl.page import main as write
from lab.rl.page import results
from lab.rl.recipe import Build, load
from lab.rl.train import Norms, _rate, train

RECIPES = sorted((Path(__file__).parents[2] / "lab/rl/recipes").glob("rl-*.toml"))

SMALL = """
env = "CartPole-v1"
timesteps = 64
n_envs = 2
normalize = true
eval_every = 32
eval_episodes = 2
seeds = [0]
[ppo]
n_steps = 16
batch_size = 16
n_epochs = 2
[policy]
net_arch = [8]
[optimizer.adam]
name = "adam"
eps = 1e-5
"""


def recipe_of(tmp_path, text=SMALL, name="small.toml"):
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["rl-cartpole", "rl-halfcheetah-300k"])
def test_a_recipe_runs_in_miniature_and_is_not_run_again(name, tmp_path, capsys, monkeypatch):
    [path] = [path for path in RECIPES if path.stem == name]
    # An episode of HalfCheetah has 1000 steps, whatever happens in it; an evaluation has one.
    monkeypatch.setattr(gymnasium.spec(load(path).env), "max_episode_steps", 50)
    arguments = [str(path), "--smoke", "--store", str(tmp_path / "store"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "| Stable-SPAM |" in said and "128 steps: return" in said and "**open**" in said
    lines = [line.key for line in load(path).lines]
    runs = stored(tmp_path / "store")
    assert [run["name"] for run in runs] == sorted(f"{name}/{line}-0" for line in lines)
    run = runs[0]
    assert run["gradient_steps"] == 8 and run["steps"] == [0, 64, 128] and math.isfinite(run["score"])
    assert run["commit"] and run["hardware"]["cpu"] and run["versions"]["stable_baselines3"]
    monkeypatch.setattr("lab.rl.train.train", None)  # must not be called
    assert main([*arguments, "--quiet"]) == 0
    assert evenstep(["report", str(tmp_path / "out" / name / "spam-0")]) == 0


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_have_the_papers_rate_and_say_where_the_rest_is_from(path):
    recipe = load(path)
    assert recipe.lr == 5e-4 and recipe.eval_episodes == 10 and recipe.source and len(recipe.seeds) >= 3
    assert {"adam", "spam", "stable_spam", "stabilized"} <= {line.key for line in recipe.lines}
    assert {line.options["eps"] for line in recipe.lines} == {1e-5}


def test_a_run_is_the_same_again_however_often_it_is_evaluated(tmp_path):
    recipe = load(recipe_of(tmp_path, SMALL.replace("[ppo]", "[ppo]\nmax_grad_norm = inf")))
    often = recipe.setting(recipe.lines[0], 3)
    first, again = (train(often, tmp_path / name, lambda _: None) for name in "ab")
    assert first == again and first["steps"] == [0, 32, 64]
    once = train(often | {"eval_every": 64}, tmp_path / "c", lambda _: None)
    assert once["steps"] == [0, 64] and once["grad_norm"] == first["grad_norm"]
    assert train(recipe.setting(recipe.lines[0], 4), tmp_path / "d", lambda _: None)["grad_norm"] != first["grad_norm"]


def test_evaluations_see_the_training_s_normalisation_true_rewards_and_the_deterministic_policy(tmp_path, monkeypatch):
    seen = []

    def evaluate(model, env, episodes, **options):
        same = (env.obs_rms.mean == model.get_env().obs_rms.mean).all() and env is not model.get_env()
        seen.append((bool(same), env.obs_rms.count, env.training, env.norm_reward, episodes, options["deterministic"]))
        return [1.0, 3.0], [5, 5]

    monkeypatch.setattr("lab.rl.train.evaluate_policy", evaluate)
    recipe = load(recipe_of(tmp_path))
    found = train(recipe.setting(recipe.lines[0], 0), tmp_path / "a", lambda _: None)
    assert found["returns"] == [2.0] * 3 and found["spreads"] == [1.0] * 3
    assert {facts[:1] + facts[2:] for facts in seen} == {(True, False, False, 2, True)}
    assert [round(facts[1]) for facts in seen] == sorted({round(facts[1]) for facts in seen})  # it grows


def test_the_rate_falls_to_zero_or_stays(tmp_path):
    setting = {"lr": 0.5, "lr_schedule": "linear"}
    assert [_rate(setting)(remaining) for remaining in (1.0, 0.5, 0.0)] == [0.5, 0.25, 0.0]
    assert _rate(setting | {"lr_schedule": "constant"}) == 0.5


def test_a_line_may_do_without_ppos_clipping(tmp_path):
    text = SMALL + '[optimizer.free]\nname = "adam"\nmax_grad_norm = inf\n'
    clipped, free = run_recipe(load(recipe_of(tmp_path, text)), tmp_path / "s", tmp_path / "o", quiet=True)
    assert clipped["grad_norm"]["max"] <= 0.50001 < free["grad_norm"]["max"]
    assert free["setting"]["ppo"]["max_grad_norm"] == "inf"


@pytest.mark.parametrize("checks", [True, False])
def test_an_agent_that_becomes_nan_is_a_result(tmp_path, monkeypatch, checks):
    # Any library of a process may turn these checks off for all.
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", checks)
    text = SMALL.replace("[ppo]", "[ppo]\nmax_grad_norm = inf").replace("timesteps", "lr = 1e38\ntimesteps")
    [run] = run_recipe(load(recipe_of(tmp_path, text)), tmp_path / "s", tmp_path / "o", quiet=True)
    assert run["score"] is None and run["average"] is None and run["steps"][0] == 0
    assert "| diverged |" in results(load(recipe_of(tmp_path, text)), [run])


def test_norms_that_are_not_finite_are_left_out():
    norms = Norms()
    norms.write({"kind": "window", "norms": [None, 2.0], "spike_rate": None})
    assert norms.summary()["grad_norm"]["max"] == 2.0
    assert math.isnan(Norms().summary()["grad_norm"]["max"])


def test_build_stands_for_an_optimizers_class():
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = Build("adam", "gradient_stabilizer")([weight], lr=0.1, betas=[0.8, 0.9])
    weight.sum().backward()
    optimizer.step()
    assert type(optimizer).__name__ == "Stabilized" and optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert torch.allclose(weight, torch.tensor(0.9))
    with pytest.raises(EvenstepError, match="optimizer spam: "):
        Build("spam")([weight], lr=0.1, density=7.0)


WRONG = {
    'env = "CartPol-v1"': "unknown env 'CartPol-v1'; did you mean 'CartPole-v1'?",
    "steps = 5": "unknown key 'steps'",
    'timesteps = "many"': "timesteps = 'many' has the wrong type; give int",
    "n_envs = 0": "n_envs = 0 is out of range; give at least 1",
    'lr_schedule = "cosine"': "lr_schedule = 'cosine'; give 'constant' or 'linear'",
    'seeds = ["a"]': "seeds = ['a']; give a list of whole numbers",
    "ppo = {n_step = 3}": "unknown key 'ppo.n_step'; did you mean 'n_steps'?",
    "policy = {net = 3}": "unknown key 'policy.net'",
    "optimizer = {}": "no optimizer; add a table such as [optimizer.adam]",
    "optimizer = {x = {}}": "[optimizer.x] needs a name",
    'optimizer = {x = {name = "adan"}}': "unknown optimizer 'adan'; did you mean",
    'optimizer = {x = {name = "spam", thresold = 1}}': "spam has no such hyperparameter; did you mean 'threshold'?",
    'optimizer = {x = {name = "scale"}}': "scale needs parameter groups",
    'optimizer = {x = {name = "adam", before = "adagm"}}': "unknown transform 'adagm'; did you mean 'adagn'?",
    'claims = [{better = "x", worse = "adam"}]': "claims.better = 'x' is not an optimizer of this recipe (adam)",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_recipe_is_refused_in_one_line(line, tmp_path, capsys):
    key = line.partition(" ")[0]
    if key in ("ppo", "policy", "optimizer"):
        head, sep = SMALL.partition(f"[{key}")[:2]
        rest = SMALL[len(head) + len(sep) :].partition("\n[")[2]
        rest = f"[{rest}" if rest else ""
        text = line + "\n" + head + rest
    else:
        text = line + "\n" + "\n".join(given for given in SMALL.splitlines() if not given.startswith(f"{key} "))
    assert main([str(recipe_of(tmp_path, text)), "--smoke"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: ") and WRONG[line] in said


def test_other_mistakes_are_one_line_too(tmp_path, capsys):
    path = str(recipe_of(tmp_path))
    assert main([path, "--only", "adm", "--store", str(tmp_path / "s")]) == 2
    assert main([str(tmp_path / "none.toml")]) == 2
    assert write([str(tmp_path / "empty")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and "no such optimizer; did you mean 'adam'?" in said[0] and "no such file" in said[1]


def test_the_verdicts_of_a_table(tmp_path):
    text = SMALL + '[optimizer.spam]\nname = "spam"\n[[claims]]\ntext = "c"\nbetter = "spam"\nworse = "adam"\n'
    recipe = replace(load(recipe_of(tmp_path, text)), seeds=(0, 1))

    def run(key, seed, score):
        norm = {"median": 0.1, "p99": 0.2, "max": 0.3}
        facts = {"score": score, "average": -score, "grad_norm": norm, "events": {"spike": 2}, "spike_rate": 0.01}
        return facts | {"setting": {"line": key, "seed": seed}, "seconds": 1.0}

    scores = {"adam": (1.0, 1.1), "spam": (2.0, 2.1)}
    said = results(recipe, [run(key, *one) for key in scores for one in enumerate(scores[key])])
    assert "| spam | 2.0 ± 0.1 | -2.0 ± 0.1 | 0.1, 0.2, 0.3 | 2.0 | 1.00% | 1 | 2 |" in said.replace("2.1 ±", "2.0 ±")
    assert "| c | - | **confirmed** (2.0 against 1.1) | **opposite** (-2.0 against -1.1) |" in said.replace(
        "2.1 a", "2.0 a"
    )


def test_the_page_in_docs_is_that_of_the_stored_runs(tmp_path, monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    page = tmp_path / "results-rl.md"
    assert write(["benchmarks/results/rl", "--page", str(page)]) == 0
    assert page.read_text() == (root / "docs/results-rl.md").read_text()
    pictures = {path.name for path in (tmp_path / "results-rl").iterdir()}
    assert pictures == {path.name for path in (root / "docs/results-rl").iterdir()}

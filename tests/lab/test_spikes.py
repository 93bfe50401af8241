import json

import numpy as np
import pytest

from evenstep import cli
from evenstep.errors import EvenstepError
from lab.spikes import Trained, build, check_model, contamination, part_of, spike_scores, study


def test_the_score_is_the_papers():
    sizes = np.array([[1.0, 0.0, 2.0], [3.0, 0.0, 2.0]], np.float32)
    np.testing.assert_allclose(spike_scores(sizes), [[0.5, 0.0, 1.0], [1.5, 0.0, 1.0]])


def test_shares_and_places():
    calm = np.ones((4, 10), np.float32)
    wild = calm.copy()
    wild[2, :5] = 60.0
    one = Trained("m", np.zeros(4), {"model.embed_tokens.weight": wild, "model.layers.0.mlp.up_proj.weight": calm})
    np.testing.assert_allclose(one.spikes(), [0, 0, 0.25, 0])
    assert one.by_part() == {"embedding": 0.125, "mlp": 0.0}
    assert one.largest()[0] == ["embed_tokens", "layers.0.mlp.up_proj"] and one.largest()[1].max() == 60.0


@pytest.mark.parametrize(
    "name, part",
    [
        ("model.embed_tokens.weight", "embedding"),
        ("gpt_neox.embed_in.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("model.layers.1.post_attention_layernorm.weight", "norms"),
        ("gpt_neox.layers.0.attention.query_key_value.bias", "attention"),
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("gpt_neox.layers.0.mlp.dense_h_to_4h.weight", "mlp"),
    ],
)
def test_parts_by_name(name, part):
    assert part_of(name) == part


def test_a_spike_stays_longest_in_adam():
    found = contamination(spike_at=210, followed=100)
    assert found["Adam"]["exp_avg_sq"][0] > 100 * found["SPAM"]["exp_avg_sq"][0]
    assert found["Stable-SPAM"]["exp_avg_sq"].max() < found["SPAM"]["exp_avg_sq"][0]
    assert found["Adam"]["exp_avg_sq_steps"] is None
    assert found["SPAM"]["exp_avg_steps"] < found["Adam"]["exp_avg_steps"] < 100


@pytest.mark.parametrize(
    "options, message",
    [
        ({"models": ["llama-9"]}, "llama-9m"),
        ({"models": [""]}, "is not a model"),
        ({"steps": 50}, "--steps 50"),
        ({"samples": 0}, "--samples 0"),
    ],
)
def test_bad_options_are_one_line(tmp_path, options, message):
    good = {"models": ["llama-tiny"], "steps": 100, "samples": 4, "source": "stdlib", "seed": 0}
    with pytest.raises(EvenstepError, match=message):
        study(tmp_path / "out", **(good | options))
    assert not (tmp_path / "out").exists()


def test_the_command_as_it_stands_asks_for_models_that_there_are(monkeypatch):
    asked = []
    monkeypatch.setattr("lab.spikes.study", lambda out, **options: asked.append(options))
    assert cli.main(["study"]) == 0
    for name in asked[0]["models"]:
        check_model(name)


def test_pythia_shapes_are_pythias():
    pytest.importorskip("transformers")
    check_model("pythia-70m")
    model, loss = build("pythia-14m", 100, 8)
    assert sum(p.numel() for name, p in model.named_parameters() if "layers.0." in name) == 198_272
    import torch

    tokens = torch.zeros(2, 8, dtype=torch.int64)
    assert loss(tokens, tokens).ndim == 0


@pytest.mark.slow
def test_the_whole_study(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tokenizers")
    out = tmp_path / "out"
    study(out, models=["llama-tiny"], steps=60, samples=8, source="kjv", seed=0, say=lambda *_: None)
    assert {path.name for path in out.iterdir()} >= {"study.json", "where.png", "moments.png"}
    assert json.loads((out / "study.json").read_text())["models"]["llama-tiny"]["largest_gss"] <= 60

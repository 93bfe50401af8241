import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from telemetry_support import parameter_names, write_run

from evenstep import cli
from evenstep.errors import EvenstepError
from evenstep.telemetry.facts import ConditionMet, check_conditions, facts, parse_condition
from evenstep.telemetry.page import POINTS, _codes, _thinned, page, payload
from evenstep.telemetry.runlog import load_run
from evenstep.telemetry.watch import make_server
from evenstep.train.log import Metrics, read_metrics, up_to
from evenstep.train.runs import list_runs

ROOT = Path(__file__).parents[2]
HOSTILE = [
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror='window.hacked=1'>",
    "@@data@@",
    "a\u2028b",
    '"\\',
]


def data_of(text):
    body = text.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    return json.loads(body)


def call(capsys, *words):
    status = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


def test_report_writes_one_page_that_loads_nothing(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    status, out, err = call(capsys, "report", run)
    assert status == 0 and str(run / "report.html") in out, err
    text = (run / "report.html").read_text()
    assert "default-src 'none'" in text and "connect-src 'none'" in text
    for loader in ("src=", "href=", "@import", "url("):
        assert loader not in text.replace(" src=x", ""), loader
    data = data_of(text)
    (one,) = data["runs"]
    assert one["name"] == "run" and one["facts"]["spikes"] == 1 and one["facts"]["max_ratio"] == 143
    assert ["optim.lr", "0.001"] in one["config"] and one["hardware"]


def test_an_event_has_its_step_place_loss_and_rows(tmp_path):
    run = load_run(write_run(tmp_path / "run"))
    event = next(e for e in payload([run])["runs"][0]["events"] if e["event"] == "spike")
    assert (event["step"], event["where"], event["rows"]) == (102, "layers.2.self_attn.k_proj", [3264, 3296])
    assert event["before"] == 5.4 and event["size"] == 143


def test_report_does_not_load_torch(tmp_path):
    run = write_run(tmp_path / "run")
    code = "import sys; sys.modules['torch'] = None; from evenstep.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "report", run], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_hostile_names_stay_text(tmp_path):
    run = load_run(write_run(tmp_path / "</title><b>", names=[*HOSTILE, *parameter_names(5)]))
    text = page(payload([run]), run.name)
    assert text.count("<script") == 2 and text.count("</script") == 2 and "<b>" not in text and "\u2028" not in text
    assert data_of(text)["runs"][0]["heat"]["names"][:5] == HOSTILE


def test_broken_lines_are_left_out_and_counted(tmp_path):
    out = write_run(tmp_path / "run")
    log = out / "metrics.jsonl"
    good = payload([load_run(out)])["runs"][0]
    lines = log.read_text().splitlines()
    bad = [
        '{"kind": "window", "step": 5',
        "[]",
        "\x00\xff",
        '{"kind": "window", "step": "x"}',
        '{"kind": "window", "step": 7}',
        '{"kind": "parameters", "step": 7, "first": 1, "ratio": [1, 2]}',
        '{"kind": "event", "step": 7, "event": 3}',
        '{"kind": "event", "step": 7, "event": "spike", "tensors": [1]}',
        '{"kind": "lowbit", "step": 7, "layers": [1]}',
        '{"kind": "new", "step": 8}',
        '{"step": 99999999999999999999999999}',
        "[" * 100000,
    ]
    log.write_text("\n".join([*lines[:30], *bad, *lines[30:], '{"step": 400, "lo']))
    run = load_run(out)
    assert payload([run])["runs"][0]["curves"] == good["curves"]
    assert any("7 lines" in note and "could not be read" in note for note in run.notes), run.notes
    assert any("5 lines of telemetry" in note for note in run.notes), run.notes
    assert any("unknown kind" in note and "new" in note for note in run.notes)


def test_values_of_other_kinds_do_not_break_the_page(tmp_path):
    out = write_run(tmp_path / "run")
    odd = [
        '{"step": 401, "loss": "high", "lr": [1], "tokens_per_second": NaN}',
        '{"step": 402, "val_loss": null}',
        '{"kind": "window", "step": 402, "first": 401, "losses": [1e400, "x"], "norms": [null], "spike_rate": "a"}',
        '{"kind": "event", "event": "spike", "step": 401, "tensors": [{"name": 5, "ratio": "x"}], "rows": "all"}',
        '{"kind": "event", "event": "</script>", "step": 402}',
        '{"kind": "parameters", "step": 402, "first": 401, "ratio": ["a", {}' + ", null" * 38 + "]}",
    ]
    with open(out / "metrics.jsonl", "a") as file:
        file.write("\n".join(odd) + "\n")
    run = load_run(out)
    text = page(payload([run]), run.name)
    assert data_of(text)["runs"][0]["steps"] == 402 and facts(run)["loss"] == pytest.approx(3.3, abs=0.2)


@pytest.mark.parametrize("content", [None, "", "\n\n", "not json\n"])
def test_an_empty_run_has_a_page_that_says_so(tmp_path, capsys, content):
    (tmp_path / "config.toml").write_text('name = "x"\n')
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    status, out, _ = call(capsys, "report", tmp_path)
    assert status == 0 and "no step has been logged yet" in out


def test_a_log_from_before_telemetry_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 3.0, "lr": 0.1, "grad_norm": 2.0}\n')
    run = load_run(tmp_path)
    assert any("no telemetry" in note for note in run.notes)
    assert payload([run])["runs"][0]["curves"]["norm"] == {"x": [10], "y": [2.0]}


def test_a_run_appended_to_the_log_of_another_takes_its_place(tmp_path):
    out = write_run(tmp_path / "run", steps=200)
    once = payload([load_run(out)])["runs"][0]
    log = out / "metrics.jsonl"
    log.write_text("\ufeff" + write_run(tmp_path / "before").joinpath("metrics.jsonl").read_text() + log.read_text())
    run = load_run(out)
    assert run.notes == ["the log begins again after step 0; later steps that it held before are left out"]
    run.notes = []
    assert payload([run])["runs"][0] == once


def test_a_newer_schema_is_told_of(tmp_path):
    out = write_run(tmp_path / "run")
    log = out / "metrics.jsonl"
    log.write_text(log.read_text().replace('"version": 1', '"version": 7', 1))
    assert any("version 7" in note for note in load_run(out).notes)


@pytest.mark.parametrize(
    "words", [["{tmp}/nowhere"], ["{tmp}"], ["{run}/config.toml"], ["{run}", "--fail-on", "spike_rat>1"]]
)
def test_mistakes_are_one_line(tmp_path, capsys, words):
    run = write_run(tmp_path / "run", steps=20)
    status, out, err = call(capsys, "report", *[word.format(tmp=tmp_path, run=run) for word in words])
    assert status == 2 and err.startswith("evenstep: error: ") and err.count("\n") == 1 and out == ""


def test_conditions(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert call(capsys, "report", run, "--fail-on", "max_ratio>200", "--fail-on", "skipped>0")[0] == 0
    status, out, err = call(capsys, "report", run, "--fail-on", "spikes >= 1")
    assert status == 1 and "run: spikes is 1" in err and "report.html" in out
    assert parse_condition("loss<=2.5") == ("loss", "<=", 2.5)
    for text in ("spike_rate", "spike_rate>", "spike_rate>x", "spike_rate=>1", ""):
        with pytest.raises(EvenstepError, match="--fail-on"):
            parse_condition(text)
    with pytest.raises(ConditionMet):
        check_conditions([("loss", "<", 100.0)], [load_run(run)])
    with pytest.raises(EvenstepError, match="does not have that number"):
        check_conditions([("gradient_error", ">", 0.5)], [load_run(run)])


def test_thinned_curves_keep_the_peaks():
    values = np.ones(50_000)
    values[31_234] = 99.0
    thin = _thinned(list(range(50_000)), values.tolist())
    assert len(thin["x"]) <= POINTS + 2 and thin["y"][thin["x"].index(31_234)] == 99.0
    assert thin["x"][0] == 0 and thin["x"][-1] == 49_999


def test_pictures_keep_the_peaks_and_say_what_codes_mean():
    import base64

    values = np.array([[0.0, np.nan, 1e-3], [10.0, 0.1, 1e3]], np.float32)
    found = _codes(values)
    codes = np.frombuffer(base64.b64decode(found["codes"]), np.uint8).reshape(3, 2).T
    assert codes[0].tolist() == [1, 0, 2] and codes[1, 2] == 255
    back = found["low"] * (found["high"] / found["low"]) ** ((codes.astype(float) - 2) / 253)
    np.testing.assert_allclose(back[1], values[1], rtol=0.03)


def test_many_steps_share_columns(tmp_path):
    run = load_run(write_run(tmp_path / "run", steps=3000, names=parameter_names(20)))
    from evenstep.telemetry.page import FIELDS, _heat

    heat = _heat(run.names, run.first, run.last, run.columns, FIELDS, 1000)
    assert len(heat["last"]) == 50 and heat["last"][-1] == 3000 and heat["first"][0] == 1
    assert heat["fields"]["ratio"]["high"] == 143.0


def test_other_tools_do_not_see_telemetry_lines(tmp_path):
    out = write_run(tmp_path / "run")
    assert all("kind" not in record for record in read_metrics(out / "metrics.jsonl"))
    assert len(read_metrics(out / "metrics.jsonl")) == 41
    (out / "config.toml").write_text('[model]\nsize = "tiny"\n[optim]\nname = "spam"\n')
    assert list_runs(out)[0].steps == 400


def test_resume_cuts_what_was_drained_after_the_checkpoint(tmp_path):
    window = {"kind": "window", "first": 1}
    records = [
        {"step": 10, "loss": 1.0},
        window | {"step": 10},
        window | {"step": 20},  # a line of step 20 begins what was written after the checkpoint of step 12
        {"kind": "event", "event": "spike", "step": 11},
        {"step": 11, "loss": 1.0},
        {"step": 20, "loss": 1.0},
    ]
    assert up_to(12, records) == [records[0], records[1], records[4]]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    metrics = Metrics(path, last_step=12)
    assert metrics.last_train == records[4] and len(path.read_text().splitlines()) == 3


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_run(path)


def window(first, step, **more):
    return {"kind": "window", "step": step, "first": first, "spike_rate": 0.0, **more}


def test_the_rate_of_a_loop_of_ones_own_is_that_of_its_windows(tmp_path):
    lines = [window(1, 4, lr=0.5), window(5, 7, lr=0.2, lrs=[0.4, None, 0.2]), window(8, 8)]
    run = write_lines(tmp_path / "m.jsonl", *lines)
    assert run.rates() == ([1, 4, 5, 7], [0.5, 0.5, 0.4, 0.2])
    assert payload([run])["runs"][0]["curves"]["lr"] == {"x": [1, 4, 5, 7], "y": [0.5, 0.5, 0.4, 0.2]}
    run = write_lines(tmp_path / "m.jsonl", *lines, {"step": 8, "lr": 0.9})
    assert run.rates() == ([1, 4, 5, 7, 8], [0.5, 0.5, 0.4, 0.2, 0.9])  # a trainer's own line, where no window has one


def test_updates_over_weights_do_not_jump_where_weights_were_looked_at(tmp_path):
    start = {"kind": "start", "step": 0, "version": 1, "names": ["a", "b"]}
    looks = [1.0, 1.0, 1.0, 1.0, 3.0, 3.0]
    lines = [
        {
            "kind": "parameters",
            "first": 10 * i + 1,
            "step": 10 * i + 10,
            "update_rms": [6.0, None],
            "weight_rms": [w, 2.0],
        }
        for i, w in enumerate(looks)
    ]
    run = write_lines(tmp_path / "m.jsonl", start, *lines)
    np.testing.assert_allclose(run.columns["update_ratio"][:, 0], [6.0, 4.0, 3.0, 2.4, 2.0, 2.0], rtol=1e-6)
    assert run.columns["weight_rms"][:, 0].tolist() == looks  # the log's own numbers stay


def event(kind, step, **more):
    return {"kind": "event", "event": kind, "step": step, **more}


SPIKE = event("spike", 30, count=1, rows=[3, 4], tensors=[{"name": "model.layers.1.mlp.up.weight", "ratio": 41.3}])
VERDICTS = {
    "calm": ([], "good", "Calm: no gradient or loss spiked"),
    "spike": ([SPIKE], "spikes", "Gradients spiked on 1 step, at most x41 (layers.1.mlp.up, step 30)."),
    "loss": ([event("loss_spike", 30), event("recovered", 34, steps=4)], "spikes", "recovered within 4 steps"),
    "lasting": ([event("loss_spike", 30)], "bad", "The loss has not recovered from its last spike."),
    "skipped": ([event("skipped", 30, count=1, tensors=[])], "spikes", "Gradients were not finite on 1 step."),
    "stays": (
        [event("stays_nonfinite", 40, since=30, rows=[3, 4])],
        "bad",
        "from step 30; the first bad batch is rows 3-4",
    ),
    "nan": (
        [SPIKE, event("weights_nonfinite", 40, since=31, rows=[264, 272], count=1, tensors=[{"name": "a"}])],
        "bad",
        "Weights are NaN since step 31; the first bad batch is rows 264-272.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VERDICTS)
def test_the_page_says_in_words_how_it_went(name, tmp_path):
    events, level, sentence = VERDICTS[name]
    run = write_lines(tmp_path / "m.jsonl", window(1, 40, losses=[3.0, 2.0], norms=[1.0]), *events)
    one = payload([run])["runs"][0]
    assert one["level"] == level and sentence in " ".join(one["verdict"])
    assert one["verdict"][-1] == "The loss went from 3 to 2 in 40 steps."


def test_nothing_is_said_of_a_run_without_telemetry(tmp_path):
    one = payload([write_lines(tmp_path / "m.jsonl", {"step": 3, "loss": 2.0})])["runs"][0]
    assert one["level"] == "" and one["verdict"] == []


def test_steps_that_were_lost_or_not_finite_are_counted(tmp_path):
    lines = [window(1, 10, nonfinite=7, lost=2), window(11, 20, nonfinite=3)]
    run = write_lines(tmp_path / "m.jsonl", *lines, event("nonfinite", 4), event("weights_nonfinite", 10, since=4))
    assert facts(run)["skipped"] == 10 and facts(run)["weights_nonfinite"] == 1
    assert "2 steps could not be measured" in run.notes
    with pytest.raises(ConditionMet, match="weights_nonfinite is 1"):
        check_conditions([parse_condition("weights_nonfinite>0")], [run])


def test_a_loss_spike_has_a_place_in_the_table(tmp_path):
    spike = event("loss_spike", 5, loss_before=2.0, loss_after=9.0, tensors=[{"name": "model.a.weight", "ratio": 3.25}])
    run = write_lines(tmp_path / "m.jsonl", window(1, 9), spike)
    [shown] = payload([run])["runs"][0]["events"]
    assert shown["where"] == "a"
    assert shown["line"] == "step 5 loss spike, loss 2 -> 9, largest gradient in a (x3.2)"


def test_the_page_names_the_command_that_prints_rows_where_there_is_one(tmp_path):
    with_data, without = write_run(tmp_path / "a run"), write_run(tmp_path / "own")
    (with_data / "config.toml").write_text('[data]\nsource = "stdlib"\n')
    commands = [run["rows_command"] for run in payload([load_run(with_data), load_run(without)])["runs"]]
    assert commands == [f"evenstep rows '{with_data}'", None]


# ---- watch ----


@pytest.fixture
def served(tmp_path):
    run = write_run(tmp_path / "run", steps=50)
    server = make_server([run])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield run, f"http://localhost:{server.server_port}"
    server.shutdown()
    server.server_close()


def get(url, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=120) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as problem:
        return problem.code, "", problem.headers


def test_watch_serves_what_the_run_writes_as_it_goes(served):
    run, url = served
    status, text, _ = get(url + "/")
    assert status == 200 and "connect-src 'self'" in text and data_of(text)["live"] is True
    status, text, headers = get(url + "/data.json")
    assert status == 200 and json.loads(text)["runs"][0]["steps"] == 50
    assert get(url + "/data.json", **{"If-None-Match": headers["ETag"]})[0] == 304
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 60, "loss": 1.0}\n')
    status, text, _ = get(url + "/data.json", **{"If-None-Match": headers["ETag"]})
    assert status == 200 and json.loads(text)["runs"][0]["steps"] == 60
    assert get(url + "/etc/passwd")[0] == 404


def test_watch_answers_this_machine_alone(served):
    _, url = served
    assert get(url + "/", Host="evil.example:80")[0] == 403
    port = int(url.rpartition(":")[2])
    with pytest.raises(EvenstepError, match="--port"):
        make_server([served[0]], port)


# ---- the page in a browser ----

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))


FLAGS = """
--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1300,1200
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium; skips where there is none, unless EVENSTEP_BROWSER=required."""
    if os.environ.get("EVENSTEP_BROWSER") != "required":
        if not CHROMIUM or not DRIVER:
            pytest.skip("no chromium and chromedriver here (Debian: apt install chromium chromium-driver)")
        pytest.importorskip("selenium")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    home = tmp_path_factory.mktemp("browser")
    for word in [*FLAGS.split(), f"--user-data-dir={home}"]:
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(DRIVER, env={**os.environ, "HOME": str(home)})
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def shown(browser, tmp_path, *runs):
    path = tmp_path / "report.html"
    path.write_text(page(payload([load_run(run) for run in runs]), "report"))
    browser.get_log("browser")
    browser.get(path.as_uri())
    return path


def complaints(browser):
    """What the console holds, but for what these tests cause themselves: reading pixels, and no favicon."""
    lines = browser.get_log("browser")
    return [line for line in lines if "getImageData" not in line["message"] and "favicon" not in line["message"]]


def drag(browser, element, start, end):
    from selenium.webdriver import ActionChains

    size = element.size
    points = [(int((x - 0.5) * size["width"]), int((y - 0.5) * size["height"])) for x, y in (start, end)]
    actions = ActionChains(browser, duration=50).move_to_element_with_offset(element, *points[0]).click_and_hold()
    actions.move_to_element_with_offset(element, *points[1]).release().perform()


def test_the_page_works_in_a_browser(browser, tmp_path):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    shown(browser, tmp_path, write_run(tmp_path / "run", lowbit=True))
    run_js = browser.execute_script
    # Every section has a chart, of all steps.
    assert run_js("return E.charts.length") >= 8
    assert run_js("return E.charts.every((c) => c.scales.x.min === 0 && c.scales.x.max === 400)")
    # The heat map answers to the mouse: the spike is where it should be, and named.
    over = browser.find_element(By.CSS_SELECTOR, "#heat .u-over")
    run_js("arguments[0].scrollIntoView({block: 'center'})", over)
    place = run_js("""const c = E.charts.find((c) => c.holder.id === 'heat');
        return [c.valToPos(105, 'x'), c.valToPos(20.5, 'y'), c.over.clientWidth, c.over.clientHeight]""")
    offset = int(place[0] - place[2] / 2), int(place[1] - place[3] / 2)
    ActionChains(browser).move_to_element_with_offset(over, *offset).perform()
    tip = browser.find_element(By.CSS_SELECTOR, "#heat .tip")
    assert tip.is_displayed() and "layers.2.self_attn.k_proj" in tip.text
    assert "101–110" in tip.text and "140" in tip.text
    # It is painted, and the calm around it looks calm: the cell of the spike is darker than its neighbour.
    pixel = """const c = E.charts.find((c) => c.holder.id === 'heat'), r = devicePixelRatio;
        const at = (x, y) => [...c.ctx.getImageData(c.valToPos(x, 'x', true), c.valToPos(y, 'y', true), 1, 1).data];
        return [at(105, 20.5), at(155, 20.5)]"""
    spike, calm = run_js(pixel)
    assert sum(spike[:3]) < sum(calm[:3]) - 200
    # A drag zooms it, and all charts follow; the button brings all steps back.
    drag(browser, over, (0.2, 0.3), (0.4, 0.7))
    low, high = run_js(
        "const c = E.charts.find((c) => c.holder.id === 'heat'); return [c.scales.x.min, c.scales.x.max]"
    )
    assert 60 < low < 100 and 140 < high < 180
    assert run_js("return E.charts.every((c) => Math.abs(c.scales.x.min - arguments[0]) < 1)", low)
    height = run_js("return [E.charts[0].scales.y.min, E.charts[0].scales.y.max]")
    assert 2 < height[0] < 6 < height[1] < 10  # still losses: only the steps are shared
    browser.find_element(By.CSS_SELECTOR, "[aria-label='all steps']").click()
    assert run_js("return E.charts.every((c) => c.scales.x.max === 400)")
    # A click on a row shows the numbers of that parameter.
    run_js("arguments[0].scrollIntoView({block: 'center'})", over)
    ActionChains(browser).move_to_element_with_offset(over, *offset).click().perform()
    assert "model.layers.2.self_attn.k_proj.weight" in browser.find_element(By.TAG_NAME, "main").text
    assert run_js("return E.charts.every((c) => c.scales.x.max === E.charts[0].scales.x.max)")
    # The table of events sorts by any head, both ways.
    head = browser.find_elements(By.CSS_SELECTOR, "#events th button")[0]

    def steps():
        return [int(cell.text) for cell in browser.find_elements(By.CSS_SELECTOR, "#events tbody td:first-child")]

    run_js("arguments[0].scrollIntoView({block: 'center'})", head)
    head.click()
    first = steps()
    head.click()
    assert first == sorted(first, reverse=True) and steps() == sorted(first) and len(set(first)) == 2
    assert browser.find_element(By.CSS_SELECTOR, "#events th").get_attribute("aria-sort") == "ascending"
    # A line of it leads to its steps.
    browser.find_elements(By.CSS_SELECTOR, "#events tbody tr")[0].click()
    assert run_js("return E.charts.every((c) => c.scales.x.min >= 50 && c.scales.x.max <= 153)")
    # Dark mode is another look, and redraws what is there.
    before = run_js("return getComputedStyle(document.body).backgroundColor")
    browser.find_element(By.CSS_SELECTOR, "[aria-label='light or dark']").click()
    assert run_js("return getComputedStyle(document.body).backgroundColor") != before
    assert run_js("return E.charts.length") >= 8
    assert complaints(browser) == []


def test_dark_mode_follows_the_system_and_a_phone_has_no_sideways_scroll(browser, tmp_path):
    media = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    screen = {"width": 375, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        shown(browser, tmp_path, write_run(tmp_path / "a"), write_run(tmp_path / "b", lr=5e-4))
        assert browser.execute_script("return document.documentElement.dataset.theme") == "dark"
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 375
        assert complaints(browser) == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_phone_shows_labels_and_events_whole(browser, tmp_path):
    screen = {"width": 375, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        shown(browser, tmp_path, write_run(tmp_path / "run"))
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 375
        wide = """return [...document.querySelectorAll('#events, #events td, #verdict')]
            .filter((e) => e.scrollWidth > e.clientWidth + 1 || e.getBoundingClientRect().right > 375).length"""
        assert browser.execute_script(wide) == 0
        # Labels beside the picture: drawn right-aligned, each in the room that its axis has.
        room = """const c = E.charts.find((c) => c.holder.id === 'heat'), axis = c.axes[1];
            const pen = document.createElement('canvas').getContext('2d');
            pen.font = '11px system-ui, sans-serif';
            const widest = Math.max(...E.data.runs[0].heat.rows.map((name) => pen.measureText(E.brief(name)).width));
            return [widest, c.over.offsetLeft - 15]"""
        widest, left = browser.execute_script(room)
        assert widest <= left
        assert complaints(browser) == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_page_says_first_what_went_wrong_and_a_click_shows_where(browser, tmp_path):
    run = write_run(tmp_path / "run")
    (run / "config.toml").write_text('[data]\nsource = "stdlib"\n')
    lines = [
        event("nonfinite", 261, count=2, rows=[8320, 8352], tensors=[{"name": "a"}]),
        event("weights_nonfinite", 270, since=261, count=2, rows=[8320, 8352], tensors=[{"name": "a"}]),
    ]
    with open(run / "metrics.jsonl", "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    shown(browser, tmp_path, run)
    first = browser.find_element("css selector", "main > section")
    assert first.get_attribute("id") == "verdict" and "bad" in first.find_element("tag name", "p").get_attribute(
        "class"
    )
    assert first.text.startswith("Weights are NaN since step 261; the first bad batch is rows 8320-8352.")
    legend = browser.find_element("css selector", "#loss").text
    assert all(kind in legend for kind in ("gradient not finite", "weights not finite", "loss spike", "spike"))
    assert browser.find_element("id", "rows").text.endswith(f"evenstep rows {run} 8320-8352")
    spike = browser.find_elements("css selector", "#events tbody tr")[0]
    browser.execute_script("arguments[0].scrollIntoView({block: 'end'})", spike)
    spike.click()
    assert browser.find_element("id", "rows").text.endswith(f"evenstep rows {run} 3264-3296")
    # The charts that it has zoomed are in sight.
    top, bottom = browser.execute_script("""const box = document.querySelector('#loss .u-over').getBoundingClientRect();
        return [box.top, box.bottom]""")
    assert top >= 0 and bottom <= browser.execute_script("return innerHeight")
    # A click that moves a little is no zoom.
    over = browser.find_element("css selector", "#loss .u-over")
    before = browser.execute_script("return E.range")
    drag(browser, over, (0.5, 0.5), (0.5 + 3 / over.size["width"], 0.5))
    assert browser.execute_script("return E.range") == before
    assert complaints(browser) == []


def test_findings_have_advice_rows_and_a_way_to_their_step(browser, tmp_path):
    run = write_run(tmp_path / "run")
    (run / "config.toml").write_text('[data]\nsource = "stdlib"\n')
    log = load_run(run)
    log.texts[3264, 3296] = [(3264, "To be"), (3265, "<b>or not</b>")]
    path = tmp_path / "report.html"
    path.write_text(page(payload([log]), "report"))
    browser.get_log("browser")
    browser.get(path.as_uri())
    spike = next(f for f in browser.find_elements("css selector", "#verdict .finding") if "x143" in f.text)
    assert "Try: " in spike.text and f"evenstep rows {run} 3264-3296" in spike.text and "To be" not in spike.text
    spike.find_element("tag name", "summary").click()
    assert "3264 To be" in spike.text and "<b>or not</b>" in spike.text
    spike.find_element("tag name", "button").click()
    assert browser.execute_script("return E.range") == [52, 152]
    # Beside the event: the command and the text. Reading them does not move the charts.
    cell = browser.find_element("css selector", "#events tbody tr")
    assert f"evenstep rows {run} 3264-3296" in cell.text
    browser.execute_script("E.show(...E.limits)")
    cell.find_element("tag name", "code").click()
    cell.find_element("tag name", "summary").click()
    assert browser.execute_script("return E.range") == [0, 400] and "3264 To be" in cell.text
    assert complaints(browser) == []


def test_there_are_panels_and_tiles_only_for_what_was_measured(browser, tmp_path):
    lines = [window(1, 40, losses=[3.0 - 0.01 * i for i in range(40)], lr=0.1, spike_rate=0.0)]
    write_lines(tmp_path / "metrics.jsonl", *lines)
    shown(browser, tmp_path, tmp_path)
    heads = [head.text for head in browser.find_elements("css selector", "section h2")]
    assert heads == ["Loss", "Learning rate"]
    assert [tile.text.split("\n")[1] for tile in browser.find_elements("class name", "tile")] == ["steps"]
    assert browser.find_element("id", "verdict").text.startswith("Calm: ")
    assert complaints(browser) == []


def forward_pass(step, scale):
    block = {"attention_max": [scale, 2 * scale], "rms": scale, "kurtosis": 3.0}
    modules = {"layers.0": block, "layers.1": block | {"rms": 3 * scale}}
    return {
        "kind": "activations",
        "step": step,
        "modules": modules | {"lm_head": {"logit_rms": scale, "logit_max": 9.0}},
    }


def test_a_sampled_forward_pass_has_the_largest_numbers_of_all_blocks_and_heads(tmp_path):
    damaged = {"kind": "activations", "step": 60, "modules": {"layers.1": {"rms": "a", "attention_max": [None]}}}
    write_lines(tmp_path / "metrics.jsonl", forward_pass(20, 1.0), forward_pass(40, 2.0), damaged)
    [run] = payload([load_run(tmp_path)])["runs"]
    wanted = {"attention_max": [2.0, 4.0], "rms": [3.0, 6.0], "logit_rms": [1.0, 2.0], "logit_max": [9.0, 9.0]}
    assert {name: run["curves"][name]["y"] for name in wanted} == wanted
    assert run["curves"]["rms"]["x"] == [20, 40]


def test_the_panels_of_a_sampled_forward_pass(browser, tmp_path):
    write_lines(tmp_path / "metrics.jsonl", forward_pass(20, 1.0), forward_pass(40, 2.0))
    shown(browser, tmp_path, tmp_path)
    heads = [head.text for head in browser.find_elements("css selector", "section h2")]
    assert heads == ["Largest attention logit", "Activations (RMS)", "Output logits"]
    assert complaints(browser) == []


@pytest.mark.parametrize("width", [1300, 800, 390])
def test_the_table_of_events_is_whole_at_any_width(browser, tmp_path, width):
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        names = [f"model.layers.{i}.post_attention_layernorm_{'x' * 60}.weight" for i in range(9)]
        run = write_run(tmp_path / "run", names=names)
        (run / "config.toml").write_text('[data]\nsource = "stdlib"\n')
        guard = event("guard", 100, bad_step=103, action="skip", reason="the loss is 9, usually 2", rows=[1, 2])
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps(guard) + "\n")
        shown(browser, tmp_path, run)
        table = browser.find_element("id", "events")
        assert (
            "the loss is 9, usually 2" in table.text
            and "The guard skipped" in browser.find_element("id", "verdict").text
        )
        assert browser.execute_script("return arguments[0].scrollWidth - arguments[0].clientWidth", table) <= 1
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_two_runs_are_drawn_side_by_side(browser, tmp_path):
    shown(browser, tmp_path, write_run(tmp_path / "first"), write_run(tmp_path / "second", lr=5e-4, steps=200))
    labels = browser.execute_script("return E.charts[0].series.slice(1).map((s) => s.label)")
    assert labels[:2] == ["training first", "training second"]
    drawn = browser.execute_script("""const c = E.charts[0];
        const box = c.bbox, data = c.ctx.getImageData(box.left, box.top, box.width, box.height).data;
        const near = (name) => {
          const v = parseInt(E.color(name).slice(1), 16), want = [v >> 16, (v >> 8) & 255, v & 255];
          let n = 0;
          for (let i = 0; i < data.length; i += 4)
            n += want.every((w, j) => Math.abs(w - data[i + j]) < 12) && data[i + 3] > 200;
          return n; };
        return [near('run0'), near('run1')]""")
    assert all(count > 100 for count in drawn)
    text = browser.find_element("tag name", "main").text
    assert "Where the configurations differ" in text and "0.0005" in text
    assert complaints(browser) == []


def test_hostile_strings_do_nothing_in_the_browser(browser, tmp_path):
    shown(browser, tmp_path, write_run(tmp_path / "<img src=x onerror=window.hacked=1>", names=[*HOSTILE, "x"]))
    browser.execute_script("E.chosen.heat.row = 0; E.build(E.data)")
    assert browser.execute_script("return window.hacked") is None
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0
    assert HOSTILE[0] in browser.find_element("tag name", "main").text
    assert complaints(browser) == []


def test_an_empty_run_opens_without_errors(browser, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    shown(browser, tmp_path, tmp_path)
    assert "no step has been logged yet" in browser.find_element("tag name", "main").text
    assert complaints(browser) == []


def test_the_watched_page_updates_itself(browser, served):
    run, url = served
    browser.get(url + "/")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 60, "loss": 1.0}\n')
    until = time.monotonic() + 15
    while browser.execute_script("return E.data.runs[0].steps") != 60:
        assert time.monotonic() < until, "the page has not noticed"
        time.sleep(0.2)
    assert browser.execute_script("return E.charts.every((c) => c.scales.x.max === 60)")
    assert complaints(browser) == []


@pytest.mark.slow
def test_a_long_run_is_small_and_opens_at_once(browser, tmp_path):
    run = write_run(tmp_path / "run", steps=50_000, names=parameter_names(200))
    path = shown(browser, tmp_path, run)
    assert path.stat().st_size < 15e6
    assert browser.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd") < 3000
    assert browser.execute_script("return E.charts.length") >= 7


def test_values_of_the_wrong_type_are_left_out(tmp_path):
    run = write_run(tmp_path / "run", steps=40)
    with open(run / "metrics.jsonl", "a") as file:
        for wrong in (
            {"kind": ["event"], "step": 41},
            {"kind": "parameters", "step": 41, "first": 41, "ratio": 3, "gss": [1.0] * 40},
            {"kind": "event", "event": "loss_spike", "step": 41, "loss_before": 10**400},
        ):
            file.write(json.dumps(wrong) + "\n")
    log = load_run(run)
    assert "lines of an unknown kind were left out: ['event']" in log.notes
    assert np.isnan(log.columns["ratio"][-1]).all() and (log.columns["gss"][-1] == 1).all()
    assert payload([log])["runs"][0]["events"][-1]["line"] == "step 41 loss_spike"


def test_a_condition_that_can_never_hold_is_refused():
    with pytest.raises(EvenstepError, match="give NAME>NUMBER"):
        parse_condition("spike_rate>nan")


def test_watch_says_when_its_run_is_gone(served):
    run, url = served
    shutil.rmtree(run)
    with pytest.raises(urllib.error.HTTPError, match="503"):
        urllib.request.urlopen(url)

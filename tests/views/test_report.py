"""The report opens from disk in a browser, without a network, and its controls show what they say."""

import csv
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic import make_heatmap

from qkov_lightning import InterferenceHeatmap, cli
from qkov_lightning.measure.encoding import HeatmapError
from qkov_lightning.measure.names import pair_label, readable
from qkov_lightning.views.answer import headline, plus_minus, predicted_rise
from qkov_lightning.views.figures import score_scale
from qkov_lightning.views.report import write_report
from qkov_lightning.views.runs import RunHistory, load_history

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
TASKS = ("math", "</script><b>code")


def write_run(folder: Path, layers: int = 3, kv_heads: int = 2) -> list[InterferenceHeatmap]:
    heatmaps = [
        make_heatmap(layers, 4, kv_heads, TASKS, step=120 * (i + 1), epoch=i, seed=i) for i in range(3)
    ]
    for heatmap in heatmaps:
        heatmap.save(folder / "snapshots" / f"step_{heatmap.step:08d}.json")
        heatmap.save(folder / "latest.json")
    return heatmaps


def test_history_is_every_snapshot_in_order_and_a_file_is_a_history_of_one(tmp_path: Path) -> None:
    write_run(tmp_path / "deep" / "interference")
    assert [h.step for h in load_history(tmp_path).heatmaps] == [120, 240, 360]
    one = load_history(tmp_path / "deep" / "interference" / "snapshots" / "step_00000240.json")
    assert [h.step for h in one.heatmaps] == [240]


def test_a_folder_without_a_heatmap_and_a_broken_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No heatmap at .*expected a heatmap file, or a folder"):
        load_history(tmp_path)
    (tmp_path / "latest.json").write_text("{}")
    with pytest.raises(HeatmapError, match=r"latest.json: heatmap schema None, expected 2"):
        load_history(tmp_path)


def test_command_takes_several_runs_and_an_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    output = tmp_path / "out" / "report.html"
    monkeypatch.setattr(
        "sys.argv", ["qkov", "report", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(output)]
    )
    cli.main()
    assert f"Wrote {output}" in capsys.readouterr().out.replace("\n", "")
    page = output.read_text()
    data = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    assert [run["name"] for run in data["runs"]] == [str(tmp_path / "a"), str(tmp_path / "b")]


def test_command_says_in_one_line_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["qkov", "report", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err.startswith("qkov: No heatmap at ")


def test_a_long_run_is_thinned_evenly_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qkov_lightning.views.report.MAX_NUMBERS", 1)
    write_report([RunHistory("r", tuple(write_run(tmp_path)))], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    (run,) = json.loads(page.split('type="application/json">')[1].split("</script>")[0])["runs"]
    assert [frame["step"] for frame in run["frames"]] == [120, 360]
    assert run["facts"]["heatmaps"] == "2 of 3"


@pytest.fixture
def page(browser: tuple[Any, list[InterferenceHeatmap], str]) -> tuple[Any, list[InterferenceHeatmap]]:
    """The page as it opens."""
    driver, heatmaps, address = browser
    driver.get("about:blank")
    driver.get(address)
    return driver, heatmaps


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, list[InterferenceHeatmap], str]]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    folder = tmp_path_factory.mktemp("report")
    heatmaps = write_run(folder / "first")
    write_run(folder / "second", layers=20, kv_heads=4)
    write_report([load_history(folder / "first"), load_history(folder / "second")], folder / "report.html")
    options = webdriver.ChromeOptions()
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
                 "--window-size=1300,1700", f"--user-data-dir={folder / 'profile'}"):  # fmt: skip
        options.add_argument(flag)
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver, heatmaps, (folder / "report.html").as_uri()
    driver.quit()


def shown(driver: Any, block: int) -> list[list[float | None]]:
    return driver.execute_script(f"return document.getElementById('heatmap').data[{2 * block}].z")


def expected(
    heatmap: InterferenceHeatmap, a: str, b: str, score: str, block: int
) -> list[list[float | None]]:
    heads = [4, 2, 2, 4][block]
    rows = heatmap.values(a, b, score)[:, :heads, block].tolist()
    return [[None if value != value else pytest.approx(value, rel=1e-3) for value in row] for row in rows]


def choose(driver: Any, name: str, index: int) -> None:
    from selenium.webdriver.support.select import Select

    Select(driver.find_element("id", name)).select_by_index(index)


def slide(driver: Any, keys: str) -> None:
    from selenium.webdriver.common.keys import Keys

    driver.find_element("id", "step").send_keys(getattr(Keys, keys))


def test_page_opens_on_the_verdict_and_the_worst_pair_of_the_last_step(page: Any) -> None:
    driver, heatmaps = page
    verdict = heatmaps[2].verdict
    assert driver.find_element("id", "headline").text == headline(verdict)
    assert driver.find_element("id", "when").text == "epoch 2, step 360"
    assert f'HeadFreezer(["{verdict.harmful[0].name}"])' in driver.find_element("id", "next").text
    worst = verdict.pairs[0]
    for block in range(4):
        assert shown(driver, block) == expected(heatmaps[2], worst.task_a, worst.task_b, "loss_rise", block)
    rows = [row.text for row in driver.find_elements("css selector", "#worst tr")]
    for row, cell in zip(rows, verdict.harmful, strict=False):
        assert row.startswith(f"{cell.name} ")
        assert plus_minus(cell.value, cell.standard_error, signed=True) in row
        assert "hurts" in row
    chosen = driver.find_element("css selector", "#rises td.chosen").text
    assert chosen.startswith(predicted_rise(worst))
    assert f"{len(worst.harmful)} hurt" in chosen


def test_a_table_of_tasks_chooses_the_pair(page: Any) -> None:
    driver, heatmaps = page
    for a, b in heatmaps[2].task_pairs:
        row, column = TASKS.index(a) + 2, TASKS.index(b) + 2
        driver.find_element("css selector", f"#rises tr:nth-child({row}) > :nth-child({column})").click()
        assert shown(driver, 0) == expected(heatmaps[2], a, b, "loss_rise", 0)


def test_slider_and_selectors_show_the_values_of_their_step_pair_and_score(page: Any) -> None:
    driver, heatmaps = page
    slide(driver, "HOME")
    assert driver.find_element("id", "when").text == "epoch 0, step 120"
    order = [(pair.task_a, pair.task_b) for pair in heatmaps[2].verdict.pairs]
    assert shown(driver, 0) == expected(heatmaps[0], *order[0], "loss_rise", 0)
    slide(driver, "ARROW_RIGHT")
    choose(driver, "pair", 1)
    scores = [option.text for option in driver.find_elements("css selector", "#score option")]
    choose(driver, "score", scores.index("cosine"))
    assert shown(driver, 3) == expected(heatmaps[1], *order[1], "cosine", 3)
    assert driver.find_element("id", "reading").text.startswith(pair_label(*order[1]) + ", cosine: ")
    axis = driver.execute_script("return document.getElementById('heatmap').layout.coloraxis")
    assert (axis["cmin"], axis["cmax"]) == (-1, 1)


def test_another_step_is_subtracted(page: Any) -> None:
    driver, heatmaps = page
    a, b = heatmaps[2].verdict.pairs[0].task_a, heatmaps[2].verdict.pairs[0].task_b
    choose(driver, "less", 1)
    change = heatmaps[2].values(a, b, "loss_rise") - heatmaps[0].values(a, b, "loss_rise")
    rows = change[:, :4, 0].tolist()
    assert shown(driver, 0) == [
        [None if value != value else pytest.approx(value, abs=2e-3) for value in row] for row in rows
    ]
    assert "what changed from step 120 to step 360" in driver.find_element("id", "reading").text


def test_a_score_in_units_is_drawn_on_the_scale_of_its_own_step(page: Any) -> None:
    driver, heatmaps = page
    for keys, heatmap in (("HOME", heatmaps[0]), ("END", heatmaps[2])):
        slide(driver, keys)
        axis = driver.execute_script("return document.getElementById('heatmap').layout.coloraxis")
        high = score_scale(heatmap, "loss_rise").high
        assert (axis["cmin"], axis["cmax"]) == (-high, high)


def test_run_selector_shows_the_other_run_with_its_own_layers_and_heads(page: Any) -> None:
    driver, _ = page
    choose(driver, "run", 1)
    assert len(shown(driver, 1)) == 20
    assert len(shown(driver, 1)[0]) == 4
    assert "20" in driver.find_element("id", "facts").text
    assert driver.find_element("id", "heatmap").size["height"] > 400
    choose(driver, "run", 0)
    assert len(shown(driver, 1)) == 3


def point_at(driver: Any, layer: int, head: int) -> Any:
    """Move the pointer to a cell of O, which has three layers and four heads."""
    from selenium.webdriver import ActionChains

    drag = driver.find_element("css selector", "#heatmap .draglayer .x4y4 .nsewdrag")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", drag)
    across, down = (head + 0.5) / 4 - 0.5, (layer + 0.5) / 3 - 0.5
    size = drag.size
    return (
        ActionChains(driver)
        .move_to_element(drag)
        .move_to_element_with_offset(drag, int(size["width"] * across), int(size["height"] * down))
    )


def test_pointer_over_a_cell_shows_its_name_value_and_error(page: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    driver, heatmaps = page
    point_at(driver, 2, 3).perform()
    WebDriverWait(driver, 10).until(
        lambda d: d.find_elements("css selector", "#heatmap .hoverlayer .hovertext")
    )
    text = driver.execute_script(
        "return document.querySelector('#heatmap .hoverlayer .hovertext').textContent"
    )
    worst = heatmaps[2].verdict.pairs[0]
    value = float(heatmaps[2].values(worst.task_a, worst.task_b, "loss_rise")[2, 3, 3])
    assert text.replace("−", "-").startswith(f"L2.H3.O{value:.4g}")
    assert "± 0.05" in text


def test_a_click_on_a_cell_opens_its_scores_control_trend_and_samples(page: Any) -> None:
    driver, heatmaps = page
    assert not driver.find_element("id", "cell").is_displayed()
    point_at(driver, 2, 3).click().perform()
    box = driver.find_element("id", "cell")
    worst = heatmaps[2].verdict.pairs[0]
    a, b = worst.task_a, worst.task_b
    assert "L2.H3.O in layers.2.attention" in box.text
    for score in heatmaps[2].scores:
        row = next(r.text for r in box.find_elements("css selector", "tr") if r.text.startswith(f"{score} "))
        for other in (b, a):  # the pair, and the control
            value = float(heatmaps[2].values(a, other, score)[2, 3, 3])
            assert plus_minus(value, 0.05) in row
    line = driver.execute_script(
        "const t = document.getElementById('trend').data[0]; return {x: t.x, y: t.y}"
    )
    assert line["x"] == [120, 240, 360]
    assert line["y"] == [
        pytest.approx(float(h.values(a, b, "loss_rise")[2, 3, 3]), rel=1e-3) for h in heatmaps
    ]
    choose(driver, "run", 0)


def test_tables_keep_the_order_of_the_verdict_and_sort_by_the_column_that_is_clicked(page: Any) -> None:
    driver, heatmaps = page

    def column(number: int) -> list[str]:
        return [
            cell.text for cell in driver.find_elements("css selector", f"#cells tbody td:nth-child({number})")
        ]

    assert column(1) == [cell.name for cell in heatmaps[2].verdict.pairs[0].cells]
    driver.find_element("css selector", "#cells th:nth-child(3)").click()
    values = [float(value) for value in column(3)]
    assert values == sorted(values, reverse=True)
    driver.find_element("css selector", "#cells th:nth-child(3)").click()
    assert [float(value) for value in column(3)] == sorted(values)
    choose(driver, "pair", heatmaps[2].shown_pairs.index((TASKS[0], TASKS[1])))
    rows = driver.find_elements("css selector", "#pairs tbody tr")
    assert [row.find_elements("css selector", "td")[0].text for row in rows] == ["a0", "a1", "a2"]


def test_csv_holds_every_cell_of_the_step(page: Any) -> None:
    driver, heatmaps = page
    text = driver.execute_script("""
        const made = []; const create = URL.createObjectURL;
        URL.createObjectURL = (blob) => { made.push(blob); return "#"; };
        document.getElementById("download").click();
        URL.createObjectURL = create;
        return made[0].text();
    """)
    rows = list(csv.DictReader(text.splitlines()))
    cells = {
        (c.task_a, c.task_b, c.layer, c.head, c.block)
        for a, b in heatmaps[2].task_pairs
        for c in heatmaps[2].cells(a, b)
    }
    found = {(r["task_a"], r["task_b"], int(r["layer"]), int(r["head"]), r["block"]) for r in rows}
    assert found == {(readable(a), readable(b), *rest) for a, b, *rest in cells}
    assert len(rows) == len(cells) * len(heatmaps[2].scores)


@pytest.mark.parametrize("width", [390, 820, 1280])
def test_no_width_needs_scrolling_sideways_and_ticks_do_not_overlap(page: Any, width: int) -> None:
    driver, _ = page
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    try:
        for number in (0, 1):
            choose(driver, "run", number)
            driver.execute_script("document.querySelector('#worst tr').click()")
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width
            boxes = driver.execute_script("""
                return ["xtick", "x2tick", "x3tick", "x4tick"].map((axis) =>
                  [...document.querySelectorAll("#heatmap ." + axis + " text")].map((t) => {
                    const box = t.getBoundingClientRect(); return [box.left, box.right]; }));
            """)
            assert any(boxes)
            for axis in boxes:
                axis.sort()
                assert all(one[1] <= other[0] for one, other in itertools.pairwise(axis))
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_one_snapshot_says_so(page: Any, tmp_path: Path) -> None:
    driver, _ = page
    (tmp_path / "latest.json").write_text(make_heatmap().to_json())
    write_report([load_history(tmp_path)], tmp_path / "one.html")
    driver.get((tmp_path / "one.html").as_uri())
    assert "the only snapshot" in driver.find_element("id", "when").text
    driver.find_element("css selector", "#worst tr").click()
    assert "One snapshot: there is no trend yet." in driver.find_element("id", "cell").text


def test_browser_console_is_silent_and_nothing_was_asked_of_a_network(page: Any) -> None:
    driver, _ = page
    assert driver.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    # The browser's own start page, before the report, is not the report's doing.
    urls = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
        and event["params"]["documentURL"] == driver.current_url
    ]
    assert urls, "The log of requests must hold at least the page itself."
    assert [url for url in urls if not url.startswith(("file:", "data:", "blob:"))] == []

"""The report opens from disk in a browser, without a network, and its controls show what they say."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic import make_heatmap

from qkov_lightning import InterferenceHeatmap, cli
from qkov_lightning.measure.encoding import HeatmapError
from qkov_lightning.views.figures import score_scale
from qkov_lightning.views.report import RunHistory, load_history, write_report

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


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, list[InterferenceHeatmap]]]:
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
    driver.get((folder / "report.html").as_uri())
    yield driver, heatmaps
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


def test_page_opens_on_the_last_step_of_the_first_pair(page: Any) -> None:
    driver, heatmaps = page
    choose(driver, "run", 0)
    assert driver.find_element("id", "when").text == "epoch 2, step 360"
    for block in range(4):
        assert shown(driver, block) == expected(heatmaps[2], *TASKS, "interference", block)


def test_slider_and_selectors_show_the_values_of_their_step_pair_and_score(page: Any) -> None:
    driver, heatmaps = page
    choose(driver, "run", 0)
    slide(driver, "HOME")
    assert driver.find_element("id", "when").text == "epoch 0, step 120"
    assert shown(driver, 0) == expected(heatmaps[0], *TASKS, "interference", 0)
    slide(driver, "ARROW_RIGHT")
    choose(driver, "pair", 1)
    choose(driver, "score", 2)
    assert shown(driver, 3) == expected(heatmaps[1], TASKS[1], TASKS[0], "cosine", 3)
    title = driver.execute_script("return document.querySelector('#heatmap .gtitle').textContent")
    assert title == "math pushes on </script><b>code: cosine"
    axis = driver.execute_script("return document.getElementById('heatmap').layout.coloraxis")
    assert (axis["cmin"], axis["cmax"]) == (-1, 1)
    choose(driver, "pair", 0)
    choose(driver, "score", 0)


def test_a_score_in_units_is_drawn_on_the_scale_of_its_own_step(page: Any) -> None:
    driver, heatmaps = page
    choose(driver, "run", 0)
    for keys, heatmap in (("HOME", heatmaps[0]), ("END", heatmaps[2])):
        slide(driver, keys)
        axis = driver.execute_script("return document.getElementById('heatmap').layout.coloraxis")
        assert (axis["cmin"], axis["cmax"]) == (0, score_scale(heatmap, "interference").high)


def test_run_selector_shows_the_other_run_with_its_own_layers_and_heads(page: Any) -> None:
    driver, _ = page
    choose(driver, "run", 1)
    assert len(shown(driver, 1)) == 20
    assert len(shown(driver, 1)[0]) == 4
    assert "20" in driver.find_element("id", "facts").text
    figure = driver.find_element("id", "heatmap")
    box = figure.find_element("xpath", "..")
    assert box.size["height"] == figure.size["height"] > 600
    choose(driver, "run", 0)
    assert len(shown(driver, 1)) == 3


def test_pointer_over_a_cell_shows_its_name_value_and_error(page: Any) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.support.ui import WebDriverWait

    driver, heatmaps = page
    choose(driver, "run", 0)
    driver.execute_script("window.scrollTo(0, 0)")
    drag = driver.find_element("css selector", "#heatmap .draglayer .x4y4 .nsewdrag")
    size = drag.size
    # From the middle to the centre of layer 2 of 3, head 3 of 4.
    ActionChains(driver).move_to_element(drag).move_to_element_with_offset(
        drag, int(size["width"] * 3 / 8), int(size["height"] / 3)
    ).perform()
    WebDriverWait(driver, 10).until(
        lambda d: d.find_elements("css selector", "#heatmap .hoverlayer .hovertext")
    )
    text = driver.execute_script(
        "return document.querySelector('#heatmap .hoverlayer .hovertext').textContent"
    )
    assert text.startswith("L2.H3.O")
    assert f"{float(heatmaps[2].values(*TASKS)[2, 3, 3]):.4g}" in text
    assert "± 0.05" in text


def test_tables_sort_by_the_column_that_is_clicked(page: Any) -> None:
    driver, heatmaps = page
    choose(driver, "run", 0)

    def column() -> list[float]:
        return [
            float(cell.text) for cell in driver.find_elements("css selector", "#cells tbody td:nth-child(3)")
        ]

    assert column() == sorted(column(), reverse=True)
    first = heatmaps[2].cells(*TASKS)[0]
    assert driver.find_element("css selector", "#cells tbody td").text == first.name
    driver.find_element("css selector", "#cells th:nth-child(3)").click()
    assert column() == sorted(column())
    assert len(column()) == len(heatmaps[2].cells(*TASKS))
    rows = driver.find_elements("css selector", "#pairs tbody tr")
    assert [row.find_elements("css selector", "td")[0].text for row in rows] == ["a0", "a1", "a2"]
    driver.find_element("css selector", "#pairs th:nth-child(4)").click()
    assert driver.find_element("css selector", "#pairs tbody td").text == "a2"


def test_trends_follow_the_hottest_cells_over_all_steps(page: Any) -> None:
    driver, heatmaps = page
    choose(driver, "run", 0)
    lines = driver.execute_script(
        "return document.getElementById('trend').data.map(t => ({name: t.name, x: t.x, y: t.y}))"
    )
    hottest = heatmaps[2].cells(*TASKS)[:8]
    assert [line["name"] for line in lines] == [cell.name for cell in hottest]
    at = (hottest[0].layer, hottest[0].head, "QKVO".index(hottest[0].block))
    assert lines[0]["x"] == [120, 240, 360]
    assert lines[0]["y"] == [pytest.approx(float(h.values(*TASKS)[at]), rel=1e-3) for h in heatmaps]


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

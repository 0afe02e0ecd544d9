# SPDX-License-Identifier: Apache-2.0
"""The inspector's page in a real, headless Chromium: it opens fast, answers pointer and keys, and can be read.

Needs Chromium with its driver on the PATH; skipped where they are not, unless REQUIRE_BROWSER is set, as
`make test-browser` does.
"""

import json
import math
import os
import random
import shutil
import time

import pytest

from trl_opsd.inspect.page import write_page
from trl_opsd.inspect.records import RolloutRecord, ViewRecord
from trl_opsd.teacher.contexts import Rollout

if os.environ.get("REQUIRE_BROWSER"):
    import selenium  # noqa: F401
else:
    pytest.importorskip("selenium", reason="selenium is not installed: make test-browser")

from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    if os.environ.get("REQUIRE_BROWSER"):
        raise RuntimeError("Chromium and chromedriver are not on the PATH (Debian: apt-get install chromium-driver).")
    pytest.skip("Chromium and chromedriver are not on the PATH", allow_module_level=True)

pytestmark = pytest.mark.slow
BOUNDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10)
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1360,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def random_record(num_tokens, words, *, strengths=(), seed=0, num_top=5):
    """A rollout of random tokens with numbers of all sizes, in the form that the inspector returns."""
    draw = random.Random(seed)
    ids = [draw.randrange(len(words)) for _ in range(num_tokens)]

    def sized(signed=True):
        return [10 ** draw.uniform(-3, 1.3) * (draw.choice((-1, 1)) if signed else 1) for _ in ids]

    views = [
        ViewRecord(
            name,
            int(name not in ("student", "target")),
            [-draw.expovariate(0.5) for _ in ids],
            [draw.randint(1, 30) for _ in ids],
            sized(False),
            [[draw.randrange(len(words)) for _ in range(num_top)] for _ in ids],
            [sorted((-draw.expovariate(0.3) for _ in range(num_top)), reverse=True) for _ in ids],
        )
        for name in ("student", "target", "plain", "teacher", "reference")
    ]
    names = ["clipped_away", "target_ratio", "shift", "total", "reference_induced", "question_conditioned"]
    names += [f"shift@{index}" for index in range(len(strengths))]
    values = {name: sized() for name in names}
    names = ["norm_total", "norm_reference_induced", "norm_question_conditioned", "divergence"]
    values |= {name: sized(False) for name in [*names, *(f"divergence@{index}" for index in range(len(strengths)))]}
    values["cosine_reference_question"] = [draw.uniform(-1, 1) for _ in ids]
    values["clipped_entries"] = [float(draw.randint(0, 2)) for _ in ids]
    rollout = Rollout([{"role": "user", "content": "2+2=?"}], "4", "text", 0.0)
    markers = [index % 50 == 3 for index in range(num_tokens)]
    return RolloutRecord(rollout, ids, [words[i] for i in ids], markers, views, values, list(strengths))


WORDS = [" " + "".join(random.Random(n).choices("abcdefghij", k=1 + n % 8)) for n in range(4000)]


@pytest.fixture
def open_page(browser, tmp_path):
    """A function that writes records to a page and opens it."""

    def open_it(*records, words=WORDS, title="Signal", scheme="light"):
        path = write_page(tmp_path / "page.html", records, words.__getitem__, title, {"method": "OPSD"})
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.get_log("browser")
        browser.get(path.as_uri())
        return browser

    return open_it


def tokens_of(browser, rollout=0):
    return browser.find_elements(By.CSS_SELECTOR, f"#tokens-{rollout} > .tok")


def panel(browser):
    return browser.find_element(By.ID, "panel").text


def choose(browser, mode):
    Select(browser.find_element(By.ID, "mode")).select_by_value(mode)


def shown_levels(browser):
    """Per token of the first rollout (level, sign) as its classes say."""
    classes = browser.execute_script("return [...document.querySelectorAll('#tokens-0 > .tok')].map(t => t.className)")
    levels = []
    for names in map(str.split, classes):
        level = next((int(name[1:]) for name in names if name[0] == "v"), 0)
        levels.append((level, -1 if "neg" in names else 1 if "pos" in names else 0))
    return levels


def expected_levels(numbers, signed):
    """From the numbers, as the page has them: thousandths."""
    levels = []
    for number in (round(1000 * number) / 1000 for number in numbers):
        level = sum(abs(number) >= bound for bound in BOUNDS)
        levels.append((level, (int(math.copysign(1, number)) if signed and level else 0)))
    return levels


def test_twenty_rollouts_of_a_thousand_tokens_open_in_two_seconds(browser, tmp_path):
    """Counted in seconds of the page's own thread, which a machine busy with something else does not stretch."""
    records = [random_record(1000, WORDS, seed=seed) for seed in range(20)]
    path = write_page(tmp_path / "page.html", records, WORDS.__getitem__, "Signal", {})
    assert path.stat().st_size < 10e6
    browser.get("about:blank")
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    browser.get(path.as_uri())
    deadline = time.monotonic() + 60
    while browser.execute_script("return document.documentElement.dataset.complete") is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    metrics = {
        entry["name"]: entry["value"] for entry in browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    }
    browser.execute_cdp_cmd("Performance.disable", {})
    assert 0.01 < metrics["TaskDuration"] < 2
    assert browser.execute_script("return document.querySelectorAll('.tokens > .tok').length") == 20_000


def test_the_pointer_shows_the_tokens_numbers_under_every_view(open_page):
    record = random_record(40, WORDS)
    browser = open_page(record)
    ActionChains(browser).move_to_element(tokens_of(browser)[7]).perform()
    text = panel(browser)
    assert f"token 8 of 40, id {record.ids[7]}" in text
    rows = [row.text for row in browser.find_elements(By.CSS_SELECTOR, "#panel > table tr")][1:]
    for row, view in zip(rows, record.views, strict=True):
        assert row.startswith(f"{view.name} {view.rank[7]} ")
        assert f"{view.log_prob[7]:.3f}".replace("-", "\u2212") in row
    boxes = browser.find_elements(By.CSS_SELECTOR, ".tops > div")
    for box, view in zip(boxes, record.views, strict=True):
        shown = [row.text.split() for row in box.find_elements(By.CSS_SELECTOR, "tr")]
        assert [word.replace("\u2423", " ") for word, _ in shown] == [WORDS[i] for i in view.top_ids[7]]
        probabilities = [math.exp(round(1000 * value) / 1000) for value in view.top_log_probs[7]]
        assert [float(p) for _, p in shown] == pytest.approx(probabilities, abs=6e-4)


@pytest.mark.parametrize(
    ("mode", "signed"),
    [
        ("divergence", False),
        ("entropy", False),
        ("clipped_away", True),
        ("target_ratio", True),
        ("shift", True),
        ("total", True),
        ("reference_induced", True),
        ("question_conditioned", True),
    ],
)
def test_switching_colours_every_token_by_its_number(open_page, mode, signed):
    record = random_record(200, WORDS)
    browser = open_page(record)
    choose(browser, mode)
    numbers = record.views[0].entropy if mode == "entropy" else record.values[mode]
    assert shown_levels(browser) == expected_levels(numbers, signed)
    assert len({level for level, _ in shown_levels(browser)}) == 8, "all levels occur in the test"


def test_the_slider_of_lambda_changes_colours_and_numbers(open_page):
    record = random_record(60, WORDS, strengths=(0.0, 1.5, 3.0))
    browser = open_page(record)
    slider = browser.find_element(By.ID, "strength")
    assert slider.is_displayed() and shown_levels(browser) == expected_levels(record.values["divergence@2"], False)
    choose(browser, "shift")
    slider.send_keys(Keys.ARROW_LEFT)
    assert shown_levels(browser) == expected_levels(record.values["shift@1"], True)
    assert browser.find_element(By.ID, "strength-value").text == "1.50"
    ActionChains(browser).move_to_element(tokens_of(browser)[3]).perform()
    assert "lambda 1.50" in panel(browser)


def test_without_a_lambda_or_a_clip_their_controls_are_away(open_page):
    record = random_record(10, WORDS)
    record.values["clipped_entries"] = [0.0] * 10
    browser = open_page(record)
    assert not browser.find_element(By.ID, "strength").is_displayed()
    assert not browser.find_element(By.ID, "show-clipped").is_displayed()
    assert "clipped_away" not in [
        option.get_attribute("value") for option in Select(browser.find_element(By.ID, "mode")).options
    ]


def test_markers_and_clipped_entries_are_marked_by_shape(open_page):
    record = random_record(60, WORDS)
    browser = open_page(record)
    script = "return [...document.querySelectorAll('#tokens-0 > .tok')].map(t => getComputedStyle(t)[arguments[0]])"
    outlines = browser.execute_script(script, "outlineStyle")
    assert [style == "solid" for style in outlines] == record.markers
    browser.find_element(By.ID, "show-clipped").click()
    lines = browser.execute_script(script, "textDecorationStyle")
    assert [style == "wavy" for style in lines] == [entries > 0 for entries in record.values["clipped_entries"]]
    browser.find_element(By.ID, "show-markers").click()
    assert set(browser.execute_script(script, "outlineStyle")) == {"none"}


def test_keys_alone_are_enough(open_page):
    browser = open_page(random_record(30, WORDS), random_record(30, WORDS, seed=1))
    browser.execute_script("document.querySelector('#show-clipped').focus()")
    ActionChains(browser).send_keys(Keys.TAB, Keys.TAB, Keys.TAB).perform()  # two folded texts, then the tokens
    assert "token 1 of 30" in panel(browser) and "rollout 1" in panel(browser)
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT).perform()
    assert "token 3 of 30" in panel(browser)
    ActionChains(browser).send_keys(Keys.END).perform()
    assert "token 30 of 30" in panel(browser)
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    ActionChains(browser).move_to_element(tokens_of(browser)[4]).perform()
    assert "token 30 of 30" in panel(browser) and "held" in panel(browser)
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    ActionChains(browser).move_to_element(tokens_of(browser)[6]).perform()
    assert "token 7 of 30" in panel(browser)


def test_a_completion_that_is_markup_is_shown_and_does_nothing(open_page):
    record = random_record(3, [HOSTILE] * 3)
    browser = open_page(record, words=[HOSTILE] * 3, title=HOSTILE)
    ActionChains(browser).move_to_element(tokens_of(browser)[1]).perform()
    assert browser.title == HOSTILE and HOSTILE in panel(browser)
    assert HOSTILE in tokens_of(browser)[0].text
    assert browser.find_elements(By.TAG_NAME, "img") == []


def test_nothing_is_fetched_and_nothing_is_complained_of(open_page):
    browser = open_page(random_record(30, WORDS))
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.get_log("browser") == []


SWATCHES = """
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const rgb = colour => { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3); };
return [...document.querySelectorAll('#legend .tok')].map(node => {
  const style = getComputedStyle(node);
  return {text: node.textContent, ink: rgb(style.color), shadow: style.boxShadow,
          back: rgb(node.className === 'tok' ? getComputedStyle(document.body).backgroundColor : style.backgroundColor)};
});
"""


def luminance(rgb):
    """Relative luminance of WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read_and_told_apart_without_hue(open_page, scheme):
    browser = open_page(random_record(20, WORDS), scheme=scheme)
    choose(browser, "total")
    swatches = browser.execute_script(SWATCHES)
    assert [swatch["text"] for swatch in swatches][6:9] == ["\u22120.01", "0", "+0.01"]
    assert min(contrast(swatch["ink"], swatch["back"]) for swatch in swatches) >= 4.5
    middle = len(swatches) // 2
    sides = swatches[: middle + 1][::-1], swatches[middle:]
    direction = -1 if scheme == "light" else 1
    for side in sides:  # in grey alone a larger number stands further from the page
        greys = [direction * luminance(swatch["back"]) for swatch in side]
        assert greys == sorted(set(greys))
    # The sign by the bar's place, the size by its height: "colour 0px {offset}px 0px 0px inset".
    offsets = [float(swatch["shadow"].split("px")[1]) for side in sides for swatch in side[1:]]
    assert offsets == [0, -1, -2, -3, -4, -5, -6, 0, 1, 2, 3, 4, 5, 6]


def test_on_a_narrow_window_the_numbers_stay_in_sight(open_page):
    browser = open_page(random_record(300, WORDS))
    browser.set_window_size(500, 900)
    try:
        ActionChains(browser).move_to_element(tokens_of(browser)[2]).perform()
        box = browser.find_element(By.ID, "panel").rect
        height = browser.execute_script("return innerHeight")
        assert "token 3 of 300" in panel(browser)
        assert box["y"] < height + browser.execute_script("return scrollY")
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    finally:
        browser.set_window_size(1360, 900)


def test_a_page_of_the_command_works_for_every_method(browser, tmp_path):
    from trl_opsd.demo import model_path
    from trl_opsd.inspect.run import run_inspect

    rows = tmp_path / "rows.jsonl"
    prompt = [{"role": "user", "content": "1+2=?"}]
    texts = ("1+2=4\n\\boxed{4}", "1+2=3\n\\boxed{3}")
    rows.write_text(
        "\n".join(json.dumps({"prompt": prompt, "completion": text, "solution": "1+2=3\n\\boxed{3}"}) for text in texts)
    )
    groups = ["--num_generations", "2", "--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "2"]
    for method, more, mode in (
        ("opsd", [], "clipped_away"),
        ("purified-opsd", [], "question_conditioned"),
        ("ogls-sd", groups, "shift"),
    ):
        words = ["--method", method, "--model_name_or_path", model_path(), "--completions", str(rows), *more]
        page = run_inspect(
            [*words, "--output", str(tmp_path / f"{method}.html"), "--output_dir", str(tmp_path / "out")]
        )
        browser.get(page.as_uri())
        choose(browser, mode)
        ActionChains(browser).move_to_element(tokens_of(browser)[4]).perform()
        assert "student" in panel(browser) and any(level for level, _ in shown_levels(browser))


def test_a_method_without_a_target_shows_its_views_and_what_it_makes_of_them(open_page):
    """No divergence is offered; the weights of views, numbers of the rollout and the sequence beside it are."""
    record, beside = random_record(12, WORDS), random_record(9, WORDS, seed=1)
    for own in (record, beside):
        own.views = [own.views[0], *(view for view in own.views if view.name in ("plain", "teacher"))]
        for view in own.views[1:]:
            view.weight = 0.25
        sized = own.values["target_ratio"]
        own.values = {name: list(sized) for name in ("push", "sampled_divergence", "ratio@0", "ratio@1")}
    record.values["trained"] = [1.0] * 11 + [0.0]
    record.numbers, beside.is_extra = {"loss of the rollout": -0.5}, True
    browser = open_page(record, beside)
    modes = [option.get_attribute("value") for option in browser.find_elements(By.CSS_SELECTOR, "#mode option")]
    assert modes == ["push", "sampled_divergence", "ratio@0", "ratio@1", "entropy"]
    headings = [heading.text for heading in browser.find_elements(By.TAG_NAME, "h2")]
    assert headings == ["Rollout 1", "Sequence beside rollout 1"]
    assert "loss of the rollout \u22120.5" in browser.find_element(By.CSS_SELECTOR, ".summary").text
    choose(browser, "ratio@1")
    ActionChains(browser).move_to_element(tokens_of(browser)[11]).perform()
    assert "teacher (weight 0.25)" in panel(browser) and "not trained on" in panel(browser)
    assert "Divergence" not in panel(browser) and "push" in panel(browser)
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]

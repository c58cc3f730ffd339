"""The page holds the numbers of the API, stays small, needs no network, and works in a browser."""

import base64
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch

from lambdabert.interpretation import (
    ExplainedPrediction,
    attention,
    explain_prediction,
    integrated_gradients,
    save_html,
    token_shares,
    trace_lambdas,
)

EVIL = "</script><script>document.title = 'broken'</script>"
MASK = 4


def stored(file):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text(encoding="utf-8"))
    return json.loads(found[1])


def numbers(packed):
    whole = np.frombuffer(base64.b64decode(packed["data"]), dtype="<i2").reshape(packed["shape"])
    return torch.from_numpy(whole.astype(np.float64)) * packed["scale"]


def explained(model, inputs, place=2):
    arguments = (model, {name: value[:1] for name, value in inputs.items()}, place, 7, MASK)
    return ExplainedPrediction(
        "“7” at [MASK].",
        explain_prediction(*arguments),
        integrated_gradients(*arguments),
        likeliest=[("<b>", 0.5)],
        place=place,
    )


@pytest.fixture
def words():
    return [f"word{i}" for i in range(9)]


class TestNumbers:
    @pytest.mark.parametrize("scope", [5, None])
    @pytest.mark.parametrize(
        "row, gain, has_repetition",
        [(0, False, False), (1, False, False), (2, False, False), (2, True, False), (0, True, True), (1, True, True)],
    )
    def test_maps_are_those_of_the_api(
        self, make_model, holey, words, tmp_path, repetition, scope, row, gain, has_repetition
    ):
        fields = repetition if has_repetition else {}
        model = make_model(local_context_size=scope, content_gain=gain, **fields)
        trace = trace_lambdas(model, holey(model))
        data = stored(save_html(trace, words, tmp_path / "page.html", row=row))
        kept = trace.token_mask[row].nonzero()[:, 0]
        assert data["places"] == kept.tolist() and data["tokens"] == [words[place] for place in kept.tolist()]
        offsets = kept[None, :] - kept[:, None]
        for index, layer in enumerate(data["layers"]):
            queries, keys, embeddings = (numbers(layer[name]) for name in ("queries", "keys", "embeddings"))
            centre = len(embeddings) // 2
            near = (offsets.abs() <= centre)[:, :, None, None]
            of_offsets = embeddings[(offsets + centre).clamp(0, 2 * centre)] * near
            maps = {
                "content": torch.einsum("nhk,mku->hnmu", queries, keys),
                "position": torch.einsum("nhk,nmku->hnmu", queries, of_offsets),
            }
            factors = {"content": (keys, layer["keys"]), "position": (embeddings, layer["embeddings"])}
            assert ("repetition_embeddings" in layer) == ("same" in data) == has_repetition
            if has_repetition:
                table = numbers(layer["repetition_embeddings"])
                factors["repetition"] = table, layer["repetition_embeddings"]
                maps["repetition"] = torch.zeros_like(maps["content"])
                for n, number in enumerate(data["same"]):
                    others = [m for m, other in enumerate(data["same"]) if m != n and other == number != -1]
                    for other in others:
                        for m in (offsets[other].abs() <= 1).nonzero()[:, 0].tolist():
                            of_queries = queries[n] @ table[offsets[other, m] + 1]
                            maps["repetition"][:, n, m] += of_queries / len(others)
            for part, found in maps.items():
                other, scale = factors[part]
                depth = queries.shape[2]
                # half a step of one factor by the largest of the other, for each key channel
                bound = depth * (layer["queries"]["scale"] * other.abs().max() + scale["scale"] * queries.abs().max())
                exact = attention(trace, index, part)[row][:, kept][:, :, kept]
                assert (found - exact).abs().max() <= bound < 1e-3 * exact.abs().max()
            shares = token_shares(trace, index)
            torch.testing.assert_close(numbers(layer["shares"]), shares.shares[row, kept], rtol=0, atol=1e-3)
            torch.testing.assert_close(numbers(layer["shares"]).sum(0), torch.ones(3).double(), rtol=0, atol=1e-3)
            content = trace.layers[index].content[row]
            left_out = (shares.left_out[row, kept] - content).norm(dim=-1) / content.norm(dim=-1)
            torch.testing.assert_close(numbers(layer["left_out"]), left_out, rtol=0, atol=1e-3)

    def test_every_number_is_within_half_a_step(self, make_model, holey, words, tmp_path):
        model = make_model()
        trace = trace_lambdas(model, holey(model))
        packed = stored(save_html(trace, words, tmp_path / "page.html"))["layers"][1]["queries"]
        error = numbers(packed) - trace.layers[1].queries[0]
        assert error.abs().max() <= packed["scale"] / 2 * (1 + 1e-9)
        assert packed["scale"] <= trace.layers[1].queries[0].abs().max() / 32767 * (1 + 1e-9)

    def test_contributions_are_those_of_the_api(self, make_model, holey, words, tmp_path):
        model = make_model()
        inputs = holey(model)
        prediction = explained(model, inputs)
        file = save_html(trace_lambdas(model, inputs), words, tmp_path / "page.html", prediction=prediction)
        data = stored(file)
        assert data["attributions"] == {
            "explanation": prediction.explanation.tokens[0].tolist(),
            "integrated gradients": prediction.integrated_gradients.tokens[0].tolist(),
        }
        assert data["chosen"] == 2
        for layer in prediction.explanation.layers:
            assert f"<td>{layer.position.sum():+.3f}</td>".replace("-", "−") in file.read_text(encoding="utf-8")

    @pytest.mark.parametrize("has_repetition", [False, True])
    def test_the_table_has_the_parts_of_the_model(self, make_model, holey, words, tmp_path, repetition, has_repetition):
        model = make_model(**(repetition if has_repetition else {}))
        inputs = holey(model)
        prediction = explained(model, inputs)
        file = save_html(trace_lambdas(model, inputs), words, tmp_path / "page.html", prediction=prediction)
        table = re.search(r"<table>(.*?)</table>", file.read_text(encoding="utf-8"))[1]
        parts = ["content", "position", *(["repetition"] if has_repetition else []), "queries", "residual"]
        assert re.findall('<th scope="col">(.*?)</th>', table) == ["layer", *parts]
        total = (prediction.explanation.logit - prediction.explanation.bias).item()
        rows = re.findall("<tr>(<th scope=.row.*?)</tr>", table)
        for row, layer in zip(rows, prediction.explanation.layers, strict=True):
            shown = [float(value.replace("−", "-")) for value in re.findall("<td>(.*?)</td>", row)]
            assert shown == pytest.approx([getattr(layer, part)[0].sum().item() for part in parts], abs=6e-4)
            assert sum(shown) == pytest.approx(total, abs=3e-3)


class TestFile:
    def test_large_texts_and_models_stay_small(self, make_model, make_inputs, tmp_path):
        fields = {"num_hidden_layers": 12, "num_lambda_queries": 8, "key_depth": 32, "intra_depth": 4}
        model = make_model(hidden_size=64, max_position_embeddings=128, local_context_size=None, **fields).float()
        inputs = make_inputs(type(model), model.config, batch=1, length=128)
        file = save_html(trace_lambdas(model, inputs), ["token"] * 128, tmp_path / "page.html")
        assert file.stat().st_size <= 4_000_000

    def test_no_address_outside(self, make_model, holey, words, tmp_path):
        model = make_model()
        inputs = holey(model)
        file = save_html(
            trace_lambdas(model, inputs), words, tmp_path / "page.html", prediction=explained(model, inputs)
        )
        text = file.read_text(encoding="utf-8")
        assert "://" not in text and not re.search(r"@import|\burl\(|\bsrc=|fetch\(|XMLHttpRequest|import\(", text)
        assert re.findall(r'href="(.*?)"', text) == ["data:,"]
        assert "default-src 'none'" in text

    def test_texts_are_escaped(self, make_model, holey, words, tmp_path):
        model = make_model()
        words[:3] = [EVIL, "<img src=x onerror=alert(1)>", "{{data}}"]
        inputs = holey(model)
        file = save_html(
            trace_lambdas(model, inputs),
            words,
            tmp_path / "page.html",
            prediction=explained(model, inputs),
            about={"<i>": EVIL},
            title=EVIL,
        )
        text = file.read_text(encoding="utf-8")
        assert text.count("<script") == 2 and "<img" not in text and "<i>" not in text and "<b><" not in text
        assert stored(file)["tokens"] == words

    def test_words_without_a_script(self, make_model, holey, words, tmp_path):
        model = make_model()
        inputs = holey(model)
        prediction = explained(model, inputs)
        file = save_html(trace_lambdas(model, inputs), words, tmp_path / "page.html", prediction=prediction)
        text = file.read_text(encoding="utf-8")
        plain = re.search(r"<noscript>.*?<pre>(.*?)</pre>.*?</noscript>", text, flags=re.DOTALL)[1].split("\n")
        rows = re.findall(r"<tr><td>(\d+)</td><th scope=\"row\">(\w+)</th><td>(.*?)</td>", text)
        assert len(plain) == len(rows) == 9
        for place, contribution in enumerate(prediction.explanation.tokens[0].tolist()):
            shown = f"{contribution:+.3f}".replace("-", "−")
            assert plain[place].startswith(f"{place} {words[place]}: explanation {shown}, integrated gradients ")
            assert rows[place] == (str(place), words[place], shown)

    def test_refusals(self, make_model, holey, words, tmp_path):
        model = make_model()
        trace = trace_lambdas(model, holey(model))
        file = tmp_path / "page.html"
        file.write_text("mine")
        with pytest.raises(ValueError, match="page.html exists and is not overwritten"):
            save_html(trace, words, file)
        assert file.read_text() == "mine"
        other = tmp_path / "other.html"
        for arguments, message in (
            ({"tokens": words[:3]}, "tokens has 3 entries for 9 places"),
            ({"row": 3}, "row=3: the trace has 3 rows"),
        ):
            with pytest.raises(ValueError, match=message):
                save_html(**{"trace": trace, "tokens": words, "file": other} | arguments)
        trace.layers[0].queries[:] = torch.nan
        with pytest.raises(ValueError, match="not finite"):
            save_html(trace, words, other)
        assert not other.exists()


@pytest.fixture(scope="module")
def open_browser():
    """Opens a headless Chromium of a width, in light or dark; outside CI, the test is skipped where there is none."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    try:
        from selenium import webdriver
    except ImportError:
        missing.append("selenium")
    if missing:
        said = f"{', '.join(missing)} not installed: apt-get install chromium chromium-driver; pip install selenium"
        if os.environ.get("CI"):
            pytest.fail(said)
        pytest.skip(said)
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))

    def show(file, width=1200, scheme="light", scripts=True):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
        browser.get(file.as_uri())
        return browser

    yield show
    browser.quit()


@pytest.fixture
def page(make_model, holey, words, tmp_path):
    """A model's page with its trace and prediction; one word is a script."""
    model = make_model(intra_depth=1)
    inputs = holey(model)
    words[3] = EVIL
    trace, prediction = trace_lambdas(model, inputs), explained(model, inputs)
    return save_html(trace, words, tmp_path / "page.html", prediction=prediction), trace, prediction


def said(browser, name):
    return browser.find_element("id", name + "-readout").text.replace("−", "-")


def values(text):
    return [float(number) for number in re.findall(r"(?:content|position|repetition|all) (-?[\d.e+-]*\d)", text)]


class TestBrowser:
    def test_opens_without_an_error_or_a_request(self, page, open_browser):
        browser = open_browser(page[0])
        assert browser.get_log("browser") == []
        assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
        assert browser.title == "What the lambdas hold"
        assert browser.find_elements("css selector", "#tokens button")[3].text == EVIL
        for name in ("content", "position", "all", "lambda"):
            colours = browser.execute_script(
                "const c = document.getElementById(arguments[0]), d = c.getContext('2d')"
                ".getImageData(0, 0, c.width, c.height).data, seen = new Set();"
                "for (let i = 0; i < d.length; i += 4) seen.add(d.slice(i, i + 3).join());"
                "return seen.size",
                "map-" + name,
            )
            assert colours > 10, name

    def test_says_the_numbers_of_the_api_by_keyboard(self, page, open_browser):
        from selenium.webdriver.common.keys import Keys

        file, trace, prediction = page
        browser = open_browser(file)
        contributions = prediction.explanation.tokens[0].tolist()
        assert float(said(browser, "tokens").split()[-1]) == pytest.approx(contributions[2], abs=6e-4)
        browser.find_elements("css selector", "#tokens button")[2].send_keys(Keys.ARROW_LEFT)
        assert browser.switch_to.active_element.text == "word1"
        assert float(said(browser, "tokens").split()[-1]) == pytest.approx(contributions[1], abs=6e-4)
        assert browser.execute_script("return getComputedStyle(document.activeElement).outlineWidth") == "3px"
        browser.find_element("css selector", "#layer option:nth-child(2)").click()
        browser.find_element("css selector", "#query option:nth-child(4)").click()
        canvas = browser.find_element("id", "map-content")
        canvas.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.HOME, Keys.ARROW_RIGHT)
        text = said(browser, "maps")
        assert "Layer 1, query 3" in text and "(3) takes from “word1” (1)" in text
        exact = [attention(trace, 1, part)[0, 3, 3, 1, 0].item() for part in ("content", "position", "all")]
        assert values(text) == pytest.approx(exact, rel=0.01, abs=1e-4)

    def test_says_the_numbers_of_the_api_under_the_pointer(self, page, open_browser):
        from selenium.webdriver import ActionChains

        file, trace, _ = page
        browser = open_browser(file)
        canvas = browser.find_element("id", "map-position")
        browser.execute_script("arguments[0].scrollIntoView()", canvas)
        size = canvas.size
        # the last row and column end at the corner
        ActionChains(browser).move_to_element_with_offset(
            canvas, size["width"] / 2 - 4, size["height"] / 2 - 4
        ).perform()
        text = said(browser, "maps")
        assert "“word8” (8) takes from “word8” (8)" in text
        exact = [attention(trace, 0, part)[0, 0, 8, 8, 0].item() for part in ("content", "position", "all")]
        assert values(text) == pytest.approx(exact, rel=0.01, abs=1e-4)
        ActionChains(browser).click().perform()
        assert browser.find_elements("css selector", "#tokens button")[8].get_attribute("aria-pressed") == "true"

    def test_repetitions(self, make_model, holey, words, repetition, tmp_path, open_browser):
        from selenium.webdriver.common.keys import Keys

        model = make_model(intra_depth=1, **repetition)
        trace = trace_lambdas(model, holey(model))
        # row 1 has a hole, which offsets are counted across
        file = save_html(trace, words, tmp_path / "page.html", row=1)
        parts = ("content", "position", "repetition", "all")
        for width in (320, 900, 1200):
            browser = open_browser(file, width=width)
            assert browser.get_log("browser") == []
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            options = browser.find_elements("css selector", "#part option")
            assert [option.text for option in options] == [*parts]
            across = browser.execute_script("return document.getElementById('map-repetition').clientWidth")
            assert across > (0.7 if width < 800 else 0.35) * width
        exact = torch.stack([attention(trace, 0, part)[1, 0, :, :, 0] for part in parts])
        kept = trace.token_mask[1].nonzero()[:, 0].tolist()
        canvas = browser.find_element("id", "map-repetition")
        for place in kept:
            cells = "return [...document.querySelectorAll('#row-table td')].map(cell => cell.textContent)"
            shown = [float(cell.replace("−", "-")) for cell in browser.execute_script(cells)]
            assert shown == pytest.approx(exact[:, place, kept].T.flatten().tolist(), rel=0.01, abs=1e-4)
            canvas.send_keys(Keys.ARROW_DOWN)
        assert (exact[2].abs() > 0.01).sum() > 5
        for option in options:
            option.click()
        assert browser.get_log("browser") == []

    def test_light_dark_and_narrow(self, page, open_browser):
        def background(browser):
            colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
            return sum(int(number) for number in re.findall(r"\d+", colour)[:3])

        assert background(open_browser(page[0], scheme="light")) > 700
        assert background(open_browser(page[0], scheme="dark")) < 100
        for width in (320, 375, 1200):
            browser = open_browser(page[0], width=width)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            across = browser.execute_script("return document.getElementById('map-all').clientWidth")
            assert across > 0.7 * width or width == 1200 and across > 300

    def test_words_where_scripts_are_off(self, page, open_browser):
        browser = open_browser(page[0], scripts=False)
        text = browser.find_element("tag name", "body").text
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
        assert "word8: explanation" in text and "All layers and queries" not in text

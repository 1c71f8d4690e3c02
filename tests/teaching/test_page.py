"""The page of a run: what it says, and that it works in a real browser, if there is one."""
import json
import re
import shutil

import numpy as np
import pytest
import torch
from test_evaluate import trained
from test_scripts import no_figures, refused  # noqa: F401

import evaluate
import plot
import run

HOSTILE = ["</script><b>", "<img src=x onerror=document.title='hit'>", "<!--", "&lt;"]


def page_of(folder, *words):
    """plot.py --html -> path of the page, its data."""
    plot.main(["--run", str(folder), "--html", *words])
    page = (folder / "page.html").read_text("utf-8")
    frame, text, rest = re.split(r'(?<=id="data">)(.*?)(?=</script>)', page, maxsplit=1, flags=re.S)
    assert len(page.encode()) < 1e6 and not re.search(r"(src|href)=|https?://|@import", frame + rest)
    return folder / "page.html", json.loads(text)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, driven by selenium; CI installs neither."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium here: pip install selenium")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium and chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for word in "headless no-sandbox disable-gpu no-first-run disable-background-networking".split():
        options.add_argument(f"--{word}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.mark.parametrize("translate", [False, True])
def test_what_the_page_says_is_what_the_run_did(folder, pairs, tmp_path, translate):
    """A path of another token, what another exit would say, FLOPs without the classifiers; sentence pairs."""
    if translate:
        folder = trained(pairs, tmp_path / "t", "--stop_at 2")
        evaluate.main(["--run", str(folder), "--rules", "full"])
    data, depth = page_of(folder, "--window", "1")[1], plot.read_depth(folder / "depth.npz")[0]
    present, names = depth["targets"][1] >= 0, ("ids", "exit_at", "visited", "said")
    rows = {name: depth[name][1][present].tolist() for name in names}
    tokens = data["tokens"]
    assert [t["text"] for t in tokens] == rows["ids"] and [t["exit"] for t in tokens] == rows["exit_at"]
    assert [[d == plot.RAN for d in t["did"]] for t in tokens] == rows["visited"]
    assert [t["said"] for t in tokens] == rows["said"] and data["exits"] == [1, 2, 3, 4]
    assert all(str(int(i)) in data["vocabulary"] for t in tokens for i in (t["text"], t["next"], *t["said"]))
    if not translate:       # the last exit is what the model says
        logits = run.open_run(folder)[3](torch.tensor([rows["ids"]]), evaluate.causal)
        assert logits.argmax(-1)[0].tolist() == [said[-1] for said in rows["said"]]
    assert data["flops"] == sorted(data["flops"]) and data["flops"][-1] > data["full"] > data["flops"][0]


def test_no_page_without_depth(folder, capsys):
    """A traceback; a page of an earlier evaluation."""
    (folder / "depth.npz").unlink()
    assert "depth.npz" in refused(capsys, plot.main, "--run", folder, "--html")
    assert not (folder / "page.html").exists()


def test_the_page_in_a_browser(folder, browser):
    """A hover that shows nothing, a slider that changes nothing, tokens that the keyboard cannot reach."""
    from selenium.webdriver import ActionChains, Keys
    path, data = page_of(folder, "--window", "0")
    browser.get(path.as_uri())
    spans, tokens = browser.find_elements("class name", "token"), data["tokens"]

    def text(name):
        return browser.find_element("id", name).text
    ActionChains(browser).move_to_element(spans[5]).perform()
    assert text("path").startswith("Token 6, ") and len(spans) == len(tokens)
    assert all(f"{p:.2f}" in text("path") for p in tokens[5]["confidence"])
    ActionChains(browser).move_to_element(spans[0]).click().send_keys(Keys.ARROW_RIGHT, Keys.END).perform()
    assert text("path").startswith(f"Token {len(spans)}, ") and browser.switch_to.active_element == spans[-1]
    before, slider = text("mean-exit"), browser.find_element("id", "threshold")
    slider.send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * 4)
    exits = [1 + next((n for n, p in enumerate(t["confidence"]) if p > 0.04), 3) for t in tokens]
    changed = np.mean([t["said"][e - 1] != t["said"][-1] for t, e in zip(tokens, exits, strict=True)])
    flops = np.mean([data["flops"][e - 1] for e in exits]) / data["full"]
    shown = [float(text(name).split()[0]) for name in ("mean-exit", "changed", "flops", "threshold-value")]
    assert shown == pytest.approx([np.mean(exits), 100 * changed, 100 * flops, 0.04], abs=0.051)
    browser.find_element("id", "as-run").send_keys(Keys.ENTER)
    assert text("mean-exit") == before
    assert float(before.split()[0]) == pytest.approx(np.mean([t["exit"] for t in tokens]), abs=0.01)


def test_hostile_tokens_are_text(folder, browser):
    """HTML in a token that ends the script or runs code."""
    words = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    words["tokens"][256:260] = HOSTILE
    (folder / "tokenizer.json").write_text(json.dumps(words), "utf-8")
    with np.load(folder / "depth.npz") as archive:
        depth = dict(archive)
    depth["ids"][:, :4] = np.arange(256, 260)
    np.savez(folder / "depth.npz", **depth)
    browser.get(page_of(folder, "--window", "0")[0].as_uri())
    spans = browser.find_elements("class name", "token")[:4]
    assert [browser.execute_script("return arguments[0].firstChild.data", span) for span in spans] == HOSTILE
    assert browser.title == "Depth of each token" and not browser.find_elements("tag name", "img")

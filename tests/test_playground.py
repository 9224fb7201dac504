"""The server's web page, tested in a browser."""

import shutil

import pytest

pytest.importorskip("fastapi", reason="needs requirements-serve.txt")
pytest.importorskip("openai", reason="needs requirements-dev.txt")
playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
from started_server import KEY, Server

CHROMIUM = next(filter(None, map(shutil.which, ("/usr/lib/chromium/chromium", "chromium", "google-chrome"))), None)


@pytest.fixture
def page():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1120, "height": 760})
        yield page
        browser.close()


def strength(page, name: str):
    return page.get_by_label(f"Strength of microworld-{name}-n1")


def ask(page) -> tuple[str, str]:
    page.click("#ask")
    page.locator("#ask:not([disabled])").wait_for()
    assert page.inner_text("#error") == ""
    return page.inner_text("#base"), page.inner_text("#aligned")


def test_base_and_aligned_answers_side_by_side(page, python):
    server, problems, addresses = Server(python), [], []
    try:
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: addresses.append(request.url))
        page.goto(server.url)
        page.fill("#key", KEY)  # the server requires it
        page.press("#key", "Tab")
        page.locator("#gates svg").wait_for()
        assert page.locator("#gates rect").count() == 6 * 8
        assert page.inner_text("#error") == ""

        base, aligned = ask(page)
        assert aligned == server.ask("microworld-pirate-n1").choices[0].message.content
        assert base == server.ask("base").choices[0].message.content
        assert "tokens" in page.inner_text("#alignedInfo")
        assert page.inner_text("#alignedName") == "Aligned: microworld-pirate-n1:1"

        strength(page, "pirate").fill("0.5")
        strength(page, "json").fill("1")
        assert page.inner_text("#alignedName") == "Aligned: microworld-pirate-n1:1"  # whose answer is shown
        mixed = server.ask("microworld-pirate-n1:0.5+microworld-json-n1").choices[0].message.content
        assert ask(page) == (base, mixed)
        assert page.inner_text("#alignedName") == "Aligned: microworld-pirate-n1:0.5+microworld-json-n1:1"
        page.get_by_role("button", name="microworld-json-n1").click()
        page.get_by_text("Gates of microworld-json-n1").wait_for()

        before = len(addresses)
        twice = """for (let i = 0; i < 2; i++) document.getElementById("question").dispatchEvent(
            new KeyboardEvent("keydown", {key: "Enter", bubbles: true, cancelable: true}))"""
        page.evaluate(f"() => {{ {twice} }}")  # the second one while answers stream
        page.locator("#ask:not([disabled])").wait_for()
        assert len(addresses) == before + 2  # the base and the aligned model, once each

        page.fill("#question", "<img src=x onerror=alert(1)>")
        ask(page)
        page.fill("#question", "")
        page.click("#ask")
        page.get_by_text("The prompt is empty").wait_for()
        assert problems == [] and all(address.startswith(server.url) for address in addresses)
    finally:
        server.stop()

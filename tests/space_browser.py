"""Fixtures: the Space in a separate process, and a browser."""

import shutil

import pytest

BROWSER_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def app_url(tmp_path_factory):
    """URL of the Space with the embedded model, for all tests of the run."""
    pytest.importorskip("gradio")
    from space import serve  # imported here: some tests start processes that do not have examples/ on their path

    folder = tmp_path_factory.mktemp("space")
    places = {"GRADIO_TEMP_DIR": str(folder / "files"), "TMPDIR": str(folder)}
    process, url = serve(
        folder / "space.log", "--visitor-sessions", "32", HF_HUB_OFFLINE="1", FORWARDED_ALLOW_IPS="127.0.0.2", **places
    )
    yield url
    process.terminate()
    process.wait(20)


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, one per module because playwright's event loop runs while the browser is open."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=BROWSER_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A new page with separate storage; the test fails if a script of the page throws."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(60_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert errors == []

"""The Space in a process of its own, and a browser to look at it; one of each serves all tests that ask for them."""

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
    """Address of the Space with the embedded model."""
    pytest.importorskip("gradio")
    from space import serve  # here, for tests start processes that know tests/ alone and import conftest

    folder = tmp_path_factory.mktemp("space")
    places = {"GRADIO_TEMP_DIR": str(folder / "files"), "TMPDIR": str(folder)}
    process, url = serve(folder / "space.log", "--visitor-sessions", "32", HF_HUB_OFFLINE="1", **places)
    yield url
    process.terminate()
    process.wait(20)


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium; one for each module, for playwright keeps an event loop running as long as it is open."""
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
    """A fresh page, with storage of its own, that must not have thrown anything by its end."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(15_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert errors == []

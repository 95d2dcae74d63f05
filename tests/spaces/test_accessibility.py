"""Check every page of the Space with all rules of axe-core."""

import pytest

axe = pytest.importorskip("axe_playwright_python.sync_playwright")


@pytest.fixture
def space(page, app_url):
    page.goto(app_url)
    page.locator(".begin").wait_for()
    # otherwise, colors would be measured during the transition between themes
    page.add_style_tag(content="* { transition: none !important; }")
    return page


def violations(page):
    """Run all rules in the light theme, and the contrast rule in the dark theme as well."""
    found = axe.Axe().run(page).response["violations"]
    page.evaluate("document.body.classList.add('dark')")
    found += axe.Axe().run(page, options={"runOnly": ["color-contrast"]}).response["violations"]
    page.evaluate("document.body.classList.remove('dark')")
    return [(rule["id"], node["html"][:200]) for rule in found for node in rule["nodes"]]


HIDDEN_PARTS = """
for (const name of ["busy", "goal", "message", "saved"]) document.querySelector(`.drive .${name}`).hidden = false;
document.querySelector(".drive .message").textContent = "The server cannot be reached.";
"""


def test_axe_finds_no_violation(space):
    assert violations(space) == []
    space.locator(".begin").click()
    space.wait_for_function("parseInt(document.querySelector('.count').textContent || '0') >= 2")
    space.evaluate(HIDDEN_PARTS)
    assert violations(space) == []

    space.get_by_role("tab", name="Trajectory").click()
    space.locator("#trajectory-pad .starts button").first.wait_for()
    space.locator("#trajectory-settings > button, #trajectory-settings .label-wrap").first.click()
    space.get_by_label("Compare with a second setting").check()
    space.locator("#trajectory-length input[type=number]").fill("2")
    space.locator("#trajectory-length input[type=number]").press("Tab")
    space.locator("#trajectory-run").click()
    space.locator("#trajectory-status").get_by_text("4 frames in").wait_for()
    space.locator("#trajectory-strip img").wait_for()
    assert violations(space) == []
    space.get_by_label("From a file").check()
    space.locator("#trajectory-run").click()
    space.locator("#trajectory-status").get_by_text("No prediction").wait_for()
    assert violations(space) == []

    space.get_by_role("tab", name="Preference").click()
    space.locator("#preference-begin").wait_for()
    assert violations(space) == []
    space.locator("#preference-begin").click()
    space.locator("#preference-view canvas").nth(2).wait_for(timeout=60_000)
    space.wait_for_function("document.activeElement.id === 'preference-left'")
    space.locator("#preference-results .label-wrap, #preference-results > button").first.click()
    space.locator("#preference-show").click()
    space.locator("#preference-rates p").first.wait_for()
    assert violations(space) == []

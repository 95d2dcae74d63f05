import asyncio
import csv

import numpy as np
import pytest

from irasim_diffusers.data import write_video

pytest.importorskip("gradio")
from preference import rates_page
from study_videos import find_demonstration, open_study, owner_key


def write_study(folder, **clips):
    """Write a study; the videos of each model have a different gray level."""
    for gray, (model, names) in enumerate(clips.items()):
        (folder / model).mkdir()
        for name in names:
            frames = np.full((3, 8, 12, 3), 60 * gray, np.uint8)
            if name.endswith(".npz"):
                np.savez(folder / model / name, frames=frames)
            else:
                write_video(folder / model / name, frames, 10)


def test_study_of_folder(tmp_path):
    write_study(tmp_path, lvdm=["1.mp4", "2.npz"], ours=["1.npz", "2.mp4", "3.mp4"], truth=["1.mp4", "2.mp4", "3.mp4"])
    study, videos = open_study(tmp_path)
    assert (study.model, study.others, study.clips) == ("lvdm", ("ours",), ("1", "2"))
    for gray, model in enumerate(("lvdm", "ours", "truth")):
        frames = asyncio.run(videos(model, "1"))
        assert frames.shape == (3, 8, 12, 3)
        assert abs(frames.mean() - 60 * gray) < 4
    study.answer("ann", study.comparisons("ann")[0], "similar")
    again, _ = open_study(tmp_path)
    assert len(again.answers()) == 1


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        ({}, "with no folders"),
        ({"a": ["1.mp4"], "truth": ["1.mp4"]}, "two or more models"),
        ({"a": ["1.mp4"], "b": ["1.mp4"]}, "videos in truth/"),
        ({"a": ["1.mp4"], "b": ["2.mp4"], "truth": ["1.mp4"]}, "at least one clip name common to"),
    ],
)
def test_invalid_study_folders_are_refused(tmp_path, clips, message):
    write_study(tmp_path, **clips)
    with pytest.raises(ValueError, match=message):
        open_study(tmp_path)


def test_no_demonstration_without_models():
    assert find_demonstration({}) is None


def test_results_of_a_folder_need_a_key(monkeypatch, capsys):
    monkeypatch.delenv("IRASIM_STUDY_KEY", raising=False)
    assert owner_key(None) is None
    assert owner_key("study") in capsys.readouterr().out
    monkeypatch.setenv("IRASIM_STUDY_KEY", "open")
    assert owner_key("study") == "open"


def test_rates_page_escapes_model_names():
    rate = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 4}
    page = rates_page({"<b>": {"win": rate, "tie": rate, "loss": rate, "answers": 8, "raters": 2}}, "ours")
    assert "ours against &lt;b&gt;" in page
    assert "<strong>50%</strong> better <small>[25%, 75%]" in page
    assert "8 answers of 2 raters on 4 clips" in page
    assert "No answers" in rates_page({}, "ours")


def test_answers_are_kept_and_exported_as_csv(page, app_url):
    page.goto(app_url)
    page.get_by_role("tab", name="Preference").click()
    page.locator("#preference-begin").click()
    page.locator("#preference-view canvas").nth(2).wait_for(timeout=60_000)
    assert page.locator("#preference-view figcaption").all_inner_texts() == ["Left", "Right", "Recording"]
    assert "Euler, 2 steps" not in page.content()
    page.locator("#preference-left").click()
    page.get_by_text("1 of 4 compared").wait_for()
    assert page.locator("#preference-back").is_visible()

    page.reload()
    page.get_by_role("tab", name="Preference").click()
    page.get_by_text("1 of 4 compared").wait_for()
    page.get_by_role("button", name="Continue").click()
    page.locator("#preference-view canvas").nth(2).wait_for()
    for number in (2, 3, 4):
        page.locator("#preference-similar").click()
        page.get_by_text(f"{number} of 4 compared").wait_for()
    page.get_by_text("Thank you! You have compared all videos.").wait_for()
    page.locator("#preference-back").click()
    page.locator("#preference-right").click()
    page.get_by_text("Thank you! You have compared all videos.").wait_for()

    page.locator("#preference-results .label-wrap, #preference-results > button").first.click()
    page.locator("#preference-show").click()
    page.locator("#preference-rates .rates").wait_for()
    with page.expect_download() as download:
        page.locator("#preference-export").click()
    with open(download.value.path(), newline="") as file:
        rows = list(csv.DictReader(file))
    latest = [row["choice"] for row in rows if row["rater"] == rows[-1]["rater"]]
    assert sorted(latest) == ["left", "right", "similar", "similar"]

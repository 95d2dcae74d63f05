import csv
import json

import pytest
from fork_server import fork_server
from preference_study import Comparison, PreferenceStudy

CLIPS = [f"clip-{number}" for number in range(40)]


def study(folder, **changes):
    return PreferenceStudy(**{"folder": folder, "clips": CLIPS, "model": "ours", "others": ["a", "b"]} | changes)


def test_order_and_sides_are_random_but_fixed_per_rater(tmp_path):
    shown = study(tmp_path).comparisons("ann")
    assert shown == study(tmp_path).comparisons("ann")
    assert shown != study(tmp_path).comparisons("bob")
    assert shown != study(tmp_path, seed=1).comparisons("ann")
    assert {(each.clip, *sorted((each.left, each.right))) for each in shown} == {
        (clip, other, "ours") for clip in CLIPS for other in "ab"
    }
    assert 20 < sum(each.left == "ours" for each in shown) < 60
    assert [each.clip for each in shown] != sorted(each.clip for each in shown)


def test_answers_are_kept_and_last_one_counts(tmp_path):
    first, second, *rest = study(tmp_path).comparisons("ann")
    study(tmp_path).answer("ann", first, "left")
    study(tmp_path).answer("ann", second, "similar")
    study(tmp_path).answer("ann", first, "right")
    again = study(tmp_path)
    assert again.remaining("ann") == rest
    assert len(again.remaining("bob")) == 80
    assert {(answer.clip, answer.choice) for answer in again.answers()} == {
        (first.clip, "right"),
        (second.clip, "similar"),
    }


def test_incomplete_line_does_not_affect_others(tmp_path):
    first, second, *_ = study(tmp_path).comparisons("ann")
    study(tmp_path).answer("ann", first, "left")
    with open(tmp_path / "answers.jsonl", "a") as file:
        file.write('{"rater": "ann", "cli')
    study(tmp_path).answer("ann", second, "right")
    assert [answer.choice for answer in study(tmp_path).answers()] == ["left", "right"]


def answer_all(folder, rater):
    for comparison in study(folder).comparisons(rater):
        study(folder).answer(rater, comparison, "similar")


def test_several_processes_serve_one_study(tmp_path):
    code = "import sys; from test_preference_study import answer_all; answer_all(*sys.argv[1:])"
    workers = [fork_server().start("-c", code, tmp_path, name) for name in "xyz"]
    assert [worker.wait() for worker in workers] == [0, 0, 0], [worker.stderr for worker in workers]
    assert len(study(tmp_path).answers()) == 3 * 80
    assert not any(study(tmp_path).remaining(name) for name in "xyz")


def test_rates_are_means_over_clips(tmp_path):
    """Two raters prefer "ours" to "a" in three quarters of the clips, on either side, and never rate "b"."""
    for rater in ("ann", "bob"):
        for comparison in study(tmp_path).comparisons(rater):
            if "b" in (comparison.left, comparison.right):
                continue
            ours = "left" if comparison.left == "ours" else "right"
            theirs = "right" if ours == "left" else "left"
            number = CLIPS.index(comparison.clip)
            study(tmp_path).answer(rater, comparison, ours if number < 30 else theirs if number < 36 else "similar")
    rates = study(tmp_path).rates()
    assert rates.keys() == {"a"}
    assert (rates["a"]["answers"], rates["a"]["raters"]) == (80, 2)
    assert [rates["a"][kind]["mean"] for kind in ("win", "tie", "loss")] == [0.75, 0.1, 0.15]
    win = rates["a"]["win"]
    assert win["n"] == 40
    deviation = (0.75 * 0.25 / 40) ** 0.5
    assert (win["high"] - win["low"]) / 2 == pytest.approx(1.96 * deviation, rel=0.15)

    study(tmp_path).export(tmp_path / "out.csv")
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 80
    assert sum(row["outcome"] == "win" for row in rows) == 60


def test_answers_of_other_clips_and_models_do_not_count(tmp_path):
    line = {"rater": "ann", "clip": "clip-0", "left": "ours", "right": "c", "choice": "left"}
    (tmp_path / "answers.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line | {"clip": "x", "right": "a"}))
    assert study(tmp_path).answers() == []
    assert study(tmp_path).rates() == {}


def test_answers_to_other_pairs_do_not_count(tmp_path):
    old = study(tmp_path, model="a", others=["ours"])
    comparison = old.comparisons("ann")[0]
    old.answer("ann", comparison, "left")
    joined = study(tmp_path, model="A", others=["a", "ours"])
    assert (len(old.answers()), joined.answers(), joined.rates()) == (1, [], {})


@pytest.mark.parametrize(
    ("rater", "changes", "choice", "message"),
    [
        ("", {}, "left", "`rater` must be a name"),
        ("ann", {}, "better", "`choice` must be one of left, similar, right, got 'better'"),
        ("ann", {"clip": "clip-99"}, "left", "`comparison` must be one of the comparisons for 'ann'"),
        ("ann", {"left": "a", "right": "b"}, "left", "`comparison` must be one of the comparisons"),
    ],
)
def test_invalid_answers_are_refused(rater, changes, choice, message, tmp_path):
    shown = study(tmp_path).comparisons(rater)[0]
    with pytest.raises(ValueError, match=message):
        study(tmp_path).answer(rater, Comparison(**vars(shown) | changes), choice)
    assert study(tmp_path).answers() == []


@pytest.mark.parametrize("changes", [{"clips": []}, {"others": []}, {"others": ["ours"]}, {"clips": ["x", "x"]}])
def test_invalid_studies_are_refused(changes, tmp_path):
    with pytest.raises(ValueError, match="`clips` and `others` must each contain at least one name"):
        study(tmp_path, **changes)

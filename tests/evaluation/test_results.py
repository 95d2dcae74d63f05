import pytest
import torch

from irasim_diffusers.evaluation import EvaluationCounter
from irasim_diffusers.evaluation.results import check_result_folder, read_result


def test_folder_belongs_to_the_settings_of_its_first_result(tmp_path):
    folder, setting = tmp_path / "out", {"seeds": (1, 2), "model": "a"}
    check_result_folder(folder, setting, "results")
    assert not folder.exists()  # the settings are written with the first result
    check_result_folder(folder, setting, "results", write=True)
    check_result_folder(folder, {"model": "b"}, "results")  # without a result, the settings are not binding
    (folder / "results").mkdir()
    check_result_folder(folder, setting, "results")
    with pytest.raises(ValueError, match="contains an evaluation with other settings: model was 'a', now 'b': choose"):
        check_result_folder(folder, setting | {"model": "b"}, "results", write=True)
    with pytest.raises(ValueError, match="other settings: steps was not set, now 4: choose"):
        check_result_folder(folder, setting | {"steps": 4}, "results", write=True)
    for content in ("", "[]", '{"model": NaN}'):
        (folder / "setting.json").write_text(content)
        with pytest.raises(
            ValueError,
            match=r"cannot be resumed: .*setting.json.* (is not valid JSON|must contain a JSON object).*; choose a new folder",
        ):
            check_result_folder(folder, setting, "results")
    (folder / "setting.json").unlink()
    check_result_folder(folder, setting, "results")
    (folder / "results" / "0.json").touch()
    with pytest.raises(ValueError, match=r"contains results but no setting.json: choose a new folder"):
        check_result_folder(folder, setting, "results", write=True)


def test_folder_with_other_files_raises(tmp_path):
    (tmp_path / "clips.json").touch()
    check_result_folder(tmp_path, {}, "results", own=("clips.json",))
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"must be a new folder or one of an earlier run, .* contains 'thesis.tex'"):
        check_result_folder(tmp_path, {}, "results", own=("clips.json",))


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "{}", '{"n": [1]}', '{"v": 1, "n": []}', '{"v": "1", "n": [1]}', '{"v": NaN, "n": [1]}'),
        *(
            '{"v": 1e999, "n": [1]}',
            '{"v": true, "n": [1]}',
            '{"v": 1, "n": ["x"]}',
            '{"v": 1, "n": 2}',
            "[" * 100_000,
        ),
    ],
)
def test_damaged_results_do_not_count(tmp_path, content):
    path, kinds = tmp_path / "a.json", {"v": float, "n": list}
    assert read_result(path, kinds) is None
    path.write_text('{"v": 1, "n": [1, [2.5]]}')
    assert read_result(path, kinds) == {"v": 1, "n": [1, [2.5]]}
    path.write_text(content)
    assert read_result(path, kinds) is None


def test_counter_removes_its_hook():
    model = torch.nn.Linear(2, 2)
    counter = EvaluationCounter(model)
    model(torch.zeros(2))
    assert counter.count == 0
    with counter:
        model(torch.zeros(2))
    model(torch.zeros(2))
    assert counter.count == 1

import pytest

from irasim_diffusers.json_files import read_json_object


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1, is not valid JSON: Expecting value"),
        (b'{"a": 1,\n}', "line 2, is not valid JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' occurs more than once in an object"),
        (b"[1]", "must contain a JSON object, got list"),
        (b'{"a": NaN}', "numbers must be finite, got NaN"),
        (b'{"a": 1e999}', "got 1e999"),
        (b'{"a": ' + b"9" * 400 + b"}", "integers must have at most 300 digits, got 400"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"a":\n "\xff"}', "line 2: the file is not JSON in UTF-8"),
    ],
)
def test_errors_name_the_file_and_the_line(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_json_object(path, finite=True)
    assert str(path) in str(error.value)


def test_missing_file_raises(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*No such file"):
        read_json_object(tmp_path / "a.json")


def test_byte_order_mark_is_accepted(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": [1, 2.5]}')
    assert read_json_object(tmp_path / "a.json", finite=True) == {"a": [1, 2.5]}

"""Selection of the action and state columns, and the inferred action space."""

import dataclasses
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_lerobot import make_episode, write_folder
from test_release import write_release
from test_tables import make_table

from irasim_diffusers.data import LeRobotFolder, TableEpisodes, infer_action_space, open_dataset, write_lerobot


def rename_features(root, names):
    """Replace the feature `action` of `write_folder` by features with the given columns and types."""
    info = json.loads((root / "meta/info.json").read_text())
    action = info["features"].pop("action")
    for key, (columns, dtype) in names.items():
        labels = [action["names"][column] for column in columns]
        info["features"][key] = {"dtype": dtype, "shape": [len(columns)], "names": labels}
    (root / "meta/info.json").write_text(json.dumps(info))
    types = {"float32": pa.float32(), "int64": pa.int64(), "bool": pa.bool_()}
    for path in (root / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        values = np.array(table["action"].to_pylist())
        table = table.drop_columns(["action"])
        for key, (columns, dtype) in names.items():
            part = values[:, columns] if dtype == "float32" else values[:, columns] > 0
            part = part.astype(dtype)
            array = pa.array(part[:, 0] if len(columns) == 1 else list(part), type=None)
            table = table.append_column(key, array.cast(types[dtype]) if len(columns) == 1 else array)
        pq.write_table(table, path)


@pytest.mark.parametrize(
    ("names", "asked", "columns"),
    [
        ({"actions": ([0, 1, 2], "float32")}, None, [0, 1, 2]),
        ({"action.pose": ([0, 1, 2], "float32")}, None, [0, 1, 2]),
        ({"actions.ee": ([1, 2], "int64")}, None, [1, 2]),
        ({"action_is_pad": ([2], "bool"), "actions": ([0, 1], "float32")}, None, [0, 1]),
        ({"action": ([0, 1], "float32"), "action.grip": ([2], "bool")}, None, [0, 1]),
        (
            {"action.pose": ([0, 1], "float32"), "action.grip": ([2], "bool")},
            ["action.grip", "action.pose"],
            [2, 0, 1],
        ),
        ({"command": ([0, 1], "float32"), "grip": ([2], "int64")}, ["command", "grip"], [0, 1, 2]),
        ({"command": ([0, 1], "float32")}, "command", [0, 1]),
    ],
)
def test_actions_have_many_names_and_types(names, asked, columns, tmp_path):
    written = write_folder(tmp_path)
    rename_features(tmp_path, names)
    source = open_dataset(tmp_path, action_column=asked)
    for before, after in zip(written, source, strict=True):
        wanted = before.actions[:, columns].copy()
        for place, column in enumerate(columns):
            dtype = next(dtype for own, dtype in names.values() if column in own)
            if dtype != "float32":
                wanted[:, place] = wanted[:, place] > 0
        assert after.actions.dtype == np.float32
        assert np.array_equal(after.actions, wanted)
        assert not set(after.states) & set(source.action_column)
    assert source.component_names("action") == [["x", "y", "grip"][column] for column in columns]
    assert dataclasses.replace(source).action_column == source.action_column


@pytest.mark.parametrize(
    ("names", "asked", "message"),
    [
        (
            {"action.pose": ([0, 1], "float32"), "action.grip": ([2], "bool")},
            None,
            r"no column 'action', and the candidates are \['action.pose', 'action.grip'\]: select .*--action_column",
        ),
        (
            {"command": ([0, 1], "float32")},
            None,
            r"no column 'action', and no action column was found in \['observation.state', 'command'",
        ),
        (
            {"actions": ([0, 1], "float32")},
            ["action"],
            r"--action_column\) must be among \['actions', .* got 'action'",
        ),
    ],
)
def test_ambiguous_or_missing_actions_name_the_flag(names, asked, message, tmp_path):
    write_folder(tmp_path)
    rename_features(tmp_path, names)
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path, action_column=asked)


def test_unselected_actions_do_not_replace_the_selected_ones(tmp_path, caplog):
    write_folder(tmp_path / "set")
    source = LeRobotFolder(tmp_path / "set", action_column=["observation.state"])
    assert "action" in source.unread_features
    copy = write_lerobot(source, tmp_path / "copy")
    assert "or that the selected actions replace, are omitted: " in caplog.text
    assert "'action' (float32" in caplog.text
    for before, after in zip(source, copy, strict=True):
        assert np.array_equal(after.actions, before.actions)


def test_state_columns_are_selected(tmp_path):
    write_folder(tmp_path)
    rename_features(tmp_path, {"action": ([0, 1], "float32"), "next.done": ([2], "bool")})
    assert set(open_dataset(tmp_path)[0].states) == {"observation.state"}
    assert set(open_dataset(tmp_path, state_columns=["next.done"])[0].states) == {"next.done"}
    with pytest.raises(ValueError, match=r"--state_columns\) must be among .* got 'pose'"):
        open_dataset(tmp_path, state_columns=["pose"])
    write_release(tmp_path / "release", "planar")
    with pytest.raises(ValueError, match=r"`action_column` .* and `state_columns` .* must be omitted"):
        open_dataset(tmp_path / "release", action_column="actions")


class Recorded:
    """Episodes of a smoothly moving robot with actions computed from its states."""

    name = "recorded"

    def __init__(self, action, names=None, state_names=None):
        generator = np.random.default_rng(0)
        self.states = []
        for _ in range(3):
            phase, speed = generator.uniform(0, 6, 3), generator.uniform(0.5, 2, 3)
            self.states.append(np.sin(np.arange(60)[:, None] / 8 * speed + phase) * [1, 2, 0.5] + [0, 5, -3])
        self.action, self.names = action, {"action": names, "observation.state": state_names}

    def __len__(self):
        return len(self.states)

    def vectors(self, number):
        state = self.states[number]
        after = np.concatenate([state[1:], state[-1:]])
        return {"action": self.action(state, after), "observation.state": state, "next.reward": state[:, :1]}

    def component_names(self, key):
        return self.names.get(key)


def noisy(values):
    return values + np.random.default_rng(1).normal(scale=0.02, size=values.shape)


@pytest.mark.parametrize(
    ("action", "names", "wanted"),
    [
        (lambda state, after: after, None, "absolute"),
        # targets ahead of the robot's position
        (lambda state, after: noisy(after + 2 * (after - state)), None, "absolute"),
        (lambda state, after: np.rad2deg(after) + 90, None, "absolute"),
        (lambda state, after: after - state, None, "relative"),
        (lambda state, after: noisy(20 * (after - state)), None, "relative"),
        (lambda state, after: np.concatenate([(after - state)[:, :2], after[:, 2:]], axis=1), None, "relative"),
        (lambda state, after: np.random.default_rng(2).normal(size=state.shape), None, None),
        (lambda state, after: after[:, :2], None, None),
        (lambda state, after: after[:, [2, 0]], ["c", "a"], "absolute"),
        (lambda state, after: np.zeros_like(state), None, None),
    ],
)
def test_the_action_space_is_inferred_from_states(action, names, wanted):
    assert infer_action_space(Recorded(action, names, ["a", "b", "c"])) == wanted


def test_columns_of_tables(tmp_path):
    episodes = [make_episode(number, length) for number, length in enumerate((5, 6))]
    table = make_table(tmp_path, episodes)
    grip = [[float(value) for value in episode.actions[:, 2]] for episode in episodes]
    table = table.add_column("grip", grip, feature=datasets.List(datasets.Value("float32")))
    both = TableEpisodes(table, action_column=["actions", "grip"])
    for before, after in zip(episodes, both, strict=True):
        np.testing.assert_array_equal(after.actions[:-1, :3], before.actions[:-1])
        np.testing.assert_array_equal(after.actions[:, 3], before.actions[:, 2])
    assert both.identity != TableEpisodes(table).identity
    renamed = table.rename_column("actions", "action")
    assert TableEpisodes(renamed).action_column == ("action",)
    two = renamed.rename_column("action", "action.pose").rename_column("grip", "action.grip")
    with pytest.raises(ValueError, match=r"the candidates are \['action.pose', 'action.grip'\].*--action_column"):
        TableEpisodes(two)

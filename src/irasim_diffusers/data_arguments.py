"""Arguments that select and prepare recorded episodes, for the training scripts and the commands."""

from dataclasses import dataclass, field

MAX_SIDE = 8192
"""Maximum height and width of resized frames, in pixels, which bounds the memory that an argument can request."""


@dataclass(kw_only=True)
class DataArguments:
    """Arguments that select the data; the help texts describe them.

    The scripts `train.py`, `train_lora.py`, `train_vae.py` and `pusht/convolutional.py` share them.
    """

    validation_dataset: str | None = field(
        default=None, metadata={"help": "dataset of held-out episodes, in any format of --dataset"}
    )
    cameras: list[str] = field(
        default_factory=list,
        metadata={
            "help": "cameras, stacked vertically; left,right joins two horizontally (default: the stored layout, the only camera, "
            "or the column video of a table)"
        },
    )
    split: str = field(
        default="train",
        metadata={
            "help": "split of the dataset, or a part such as train[:90%%] (not of an IRASim folder, a `save_to_disk` folder or a "
            "streamed table)"
        },
    )
    validation_split: str = field(
        default="train", metadata={"help": "split of the validation dataset, or a part such as train[90%%:]"}
    )
    skip_broken: bool = field(default=False, metadata={"help": "skip episodes that cannot be read, and list them"})
    height: int | None = field(
        default=None,
        metadata={"help": "resize frames to this height and --width, in pixels; the paper resizes Bridge to 256x320"},
    )
    width: int | None = field(default=None, metadata={"help": "width in pixels; requires --height"})
    action_column: list[str] = field(
        default_factory=list,
        metadata={
            "help": "action columns of a LeRobotDataset or table, concatenated (default: action of a LeRobotDataset, actions of a "
            "table, or the only column with a similar name)"
        },
    )

    @property
    def frame_size(self) -> tuple[int, int] | None:
        """Height and width to which frames are resized; None to keep their size."""
        return (self.height, self.width) if self.height and self.width else None


@dataclass(kw_only=True)
class EpisodeArguments(DataArguments):
    """Arguments that also determine frame rate, states and actions; the help texts describe them."""

    fps: float | None = field(default=None, metadata={"help": "frame rate, if the dataset does not store it"})
    frame_skip: int = field(
        default=1, metadata={"help": "use every n-th frame; windows for training may start at any frame"}
    )
    state_columns: list[str] = field(
        default_factory=list,
        metadata={"help": "state columns of a LeRobotDataset (default: all float ones) or a table (default: none)"},
    )
    action_derivation: str = field(
        default="recorded",
        metadata={
            "help": "recorded, or derived from states: relative_euler, relative_6d, relative_planar, absolute (IRASim folders "
            "without recorded actions: relative_euler by default)"
        },
    )
    action_composition: str | None = field(
        default=None,
        metadata={
            "help": "derivation of recorded actions, which determines how they compose over skipped frames: relative_euler, "
            "relative_6d, relative_planar or absolute; required to skip frames, unless the dataset stores it"
        },
    )
    state_key: str | None = field(
        default=None, metadata={"help": "state feature that actions are derived from (default: the only one)"}
    )
    pad_actions_to: int | None = field(
        default=None, metadata={"help": "pad actions with zeros to this number of components"}
    )

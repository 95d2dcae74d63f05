"""The Trajectory page: draw a path or upload actions, see the video, and compare two settings."""

import asyncio
import html
import logging
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from comparison import (
    MAX_STEPS,
    Setting,
    action_table,
    align,
    error_table,
    errors,
    name_settings,
    pipeline_of,
    predict,
    scheduler_names,
    side_by_side,
)
from drawing import can_draw, drawing
from scenes import (
    DRAWN,
    FILE,
    LONGEST_DRAWING,
    Scene,
    action_kinds,
    choose_actions,
    default_scale,
    examples,
    known_truth,
    start_canvas,
    upload_scene,
)
from uploads import data_url
from viewer import videos, viewer
from visitor_files import ACTION_SUFFIXES, resize
from worlds import World, Worlds

from irasim_diffusers.data import write_video
from irasim_diffusers.pictures import film_strip

COLORS = ("#6366f1", "#f59e0b")
BASELINE, BASELINE_COLOR = "last-frame baseline", "#6b7280"
INTRODUCTION = (
    "Draw a path for the robot, replay recorded actions, or upload your own: the model predicts the video. Compare two models, "
    "samplers or seeds side by side."
)
LOGGER = logging.getLogger(__name__)


def trajectory_page(worlds: Worlds) -> None:
    """Build the page, inside a tab."""
    if worlds:
        TrajectoryPage(worlds)
    else:
        gr.Markdown("No model could be loaded.")


@dataclass
class Task:
    """A checked request of a visitor."""

    settings: dict[str, Setting]  # by title
    pipelines: dict[str, Any]  # by title
    scene: Scene
    truth: np.ndarray  # (m, H, W, 3), uint8, m <= n; empty if unknown
    actions: np.ndarray  # (n, A), raw units

    @property
    def world(self) -> World:
        """The model of the first setting."""
        return next(iter(self.settings.values())).world

    @property
    def fps(self) -> float:
        """Frame rate of the video."""
        return self.world.pipeline.transformer.config.fps or 10

    def panels(self) -> dict[str, np.ndarray]:
        """Return the videos (T, H, W, 3) before a prediction: the history, and the ground truth if known."""
        panels = {"Truth": np.concatenate([self.scene.history, self.truth])} if len(self.truth) else {}
        sizes = {name: each.world.pipeline.frame_size for name, each in self.settings.items()}
        return panels | {name: resize(self.scene.history, size) for name, size in sizes.items()}


class TrajectoryPage:
    """The components of the page and their event handlers."""

    def __init__(self, worlds: Worlds) -> None:
        self.worlds = worlds
        self.scenes = {name: examples(world) for name, world in worlds.items()}
        self.running: dict[str | None, list[Any]] = {}  # pipelines that predict, by visitor
        gr.Markdown(INTRODUCTION)
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                self._build_start(next(iter(worlds.values())))
                self._build_settings(next(iter(worlds.values())))
            with gr.Column(scale=6, min_width=320):
                self._build_results()
        self._connect()

    def _build_start(self, world: World) -> None:
        scenes = self.scenes[world.name]
        scene = scenes[0] if scenes else None
        kinds = action_kinds(world, scene)
        self.scene = gr.State(scene)
        self.path = gr.State([])  # drawn by the visitor; the value of the drawing is too large for a request
        self.pad = drawing(start_canvas(scene, world, scenes, 0), elem_id="trajectory-pad")
        with gr.Row():
            self.run = gr.Button("Predict", variant="primary", min_width=120, elem_id="trajectory-run")
            self.stop = gr.Button("Stop", variant="stop", min_width=120, visible=False, elem_id="trajectory-stop")
            self.upload = gr.UploadButton(
                "Upload a start …", file_types=["image", "video"], min_width=120, elem_id="trajectory-upload"
            )
        self.status = gr.HTML(min_height=48, elem_id="trajectory-status")
        self.kind = gr.Radio(kinds, value=kinds[0], label="Actions", elem_id="trajectory-kind")
        self.file = gr.File(
            label=f"Actions: one row per frame ({', '.join(ACTION_SUFFIXES)})",
            file_types=list(ACTION_SUFFIXES),
            height=130,
            visible=kinds[0] == FILE,
            elem_id="trajectory-file",
        )
        self.length = gr.Slider(1, LONGEST_DRAWING, 24, step=1, label="Frames to predict", elem_id="trajectory-length")
        self.scale = gr.Number(
            default_scale(world), label="Width of the image in action units", visible=_is_scaled(world)
        )

    def _build_settings(self, world: World) -> None:
        with gr.Accordion("Model, sampler, seed, comparison", open=False, elem_id="trajectory-settings"):
            self.first = self._setting_controls(world, "a", seed=0)
            self.compare = gr.Checkbox(label="Compare with a second setting", elem_id="trajectory-compare")
            with gr.Column(visible=False) as self.second_box:
                self.second = self._setting_controls(world, "b", seed=1)

    def _setting_controls(self, world: World, name: str, seed: int) -> list[Any]:
        """Add the controls of a setting: model, sampler, steps and seed."""
        own, names = type(world.pipeline.scheduler).__name__, scheduler_names(world.pipeline)
        model = gr.Dropdown(list(self.worlds), value=world.name, label="Model", visible=len(self.worlds) > 1)
        with gr.Row():
            scheduler = gr.Dropdown(
                list(names), value=own, label="Sampler", min_width=150, scale=3, elem_id=f"trajectory-scheduler-{name}"
            )
            steps = gr.Number(
                world.pipeline.config.num_inference_steps,
                label="Steps",
                precision=0,
                minimum=1,
                maximum=MAX_STEPS,
                min_width=70,
                elem_id=f"trajectory-steps-{name}",
            )
            number = gr.Number(seed, label="Seed", precision=0, min_width=70, elem_id=f"trajectory-seed-{name}")
        return [model, scheduler, steps, number]

    def _build_results(self) -> None:
        self.view = viewer("Draw on the image or press Predict. The video appears here.", elem_id="trajectory-view")
        with gr.Column(visible=False) as self.results:
            self.error_plot = gr.LinePlot(
                x="frame",
                y="PSNR (dB)",
                color="video",
                title="PSNR by frame: higher is closer to the ground truth",
                height=220,
                elem_id="trajectory-errors",
            )
            self.action_plot = gr.LinePlot(
                x="frame", y="action", color="component", title="Actions by frame", height=220
            )
            self.strip = gr.HTML(elem_id="trajectory-strip")
            with gr.Row():
                self.picture = gr.DownloadButton("Film strip (.png)", size="sm", elem_id="trajectory-picture")
                self.video = gr.DownloadButton("Video (.mp4)", size="sm", elem_id="trajectory-video")
                self.table = gr.DownloadButton("Actions (.csv)", size="sm", elem_id="trajectory-table")

    def _connect(self) -> None:
        private: Any = {"api_visibility": "private"}
        quiet: Any = private | {"show_progress": "hidden", "queue": False}
        asked: Any = {
            self.scene,
            self.kind,
            self.path,
            self.file,
            self.length,
            self.scale,
            *self.first,
            self.compare,
            *self.second,
        }
        made = [self.view, self.status, self.results, self.error_plot, self.action_plot, self.strip, self.picture]
        made += [self.video, self.table, self.stop]
        predict: Any = {
            "fn": self.predict,
            "inputs": asked,
            "outputs": made,
            "show_progress_on": [self.status],
            "concurrency_limit": 1,  # limits the load of this page, whatever the number of visitors
            "concurrency_id": "predict",
        } | private
        drawn = self.pad.drawn(self.take_drawn, outputs=[self.kind, self.path], **quiet)
        for started in (drawn, self.run.click(self.interrupt, **quiet)):
            started.then(trigger_mode="multiple", **predict)
        # without `cancels`, because a canceled event can end with the status "Error" if the server is busy
        stopped = self.stop.click(self.interrupt, **quiet)
        stopped = stopped.then(lambda: self._idle("Stopped."), outputs=made, **quiet)
        # the focused button is hidden, so move the focus
        stopped.then(None, js="() => document.querySelector('#trajectory-run').focus()", **private)
        start, model = [self.scene, self.pad, self.path, self.kind], [self.first[0], self.kind]
        self.pad.picked(self.choose_example, model, start, **quiet)
        self.upload.upload(self.choose_upload, [self.upload, *model], [*start, self.status], **private)
        self.first[0].change(self.choose_model, model, [*start, self.scale, *self.first[1:3]], **private)
        self.second[0].change(self.choose_sampler, self.second[0], self.second[1:3], **private)
        self.compare.change(lambda on: gr.Column(visible=on), self.compare, self.second_box, **quiet)
        self.kind.change(
            lambda kind: (gr.File(visible=kind == FILE), gr.Slider(visible=kind != FILE)),
            self.kind,
            [self.file, self.length],
            **quiet,
        )

    def take_drawn(self, request: gr.Request, event: gr.EventData) -> tuple[str, Any]:
        """Take the path that the visitor drew; it replaces the visitor's running prediction."""
        self._stop(request.session_hash)
        return DRAWN, event.path

    def choose_example(self, name: str, kind: str, event: gr.EventData) -> tuple[Any, ...]:
        """Select an example as the start."""
        scenes, index = self.scenes.get(name, []), event.index
        if not isinstance(index, int) or not 0 <= index < len(scenes):
            return (gr.skip(),) * 4
        return self._start(scenes[index], name, kind, index)

    def choose_upload(self, path: str, name: str, kind: str) -> tuple[Any, ...]:
        """Use an uploaded file as the start."""
        try:
            return *self._start(upload_scene(path, self.worlds.named(name)), name, kind), ""
        except ValueError as error:
            return *(gr.skip(),) * 4, _alert(f"This file cannot be a start: {error}")

    def choose_model(self, name: str, kind: str) -> tuple[Any, ...]:
        """Select another model, with its first example and its samplers."""
        world, scenes = self.worlds.named(name), self.scenes[name]
        scale = gr.Number(default_scale(world), visible=_is_scaled(world))
        return *self._start(scenes[0] if scenes else None, name, kind, 0), scale, *self.choose_sampler(name)

    def choose_sampler(self, name: str) -> tuple[Any, ...]:
        """Return the samplers and the number of steps of a model."""
        pipeline = self.worlds.named(name).pipeline
        own, names = type(pipeline.scheduler).__name__, scheduler_names(pipeline)
        return gr.Dropdown(list(names), value=own), pipeline.config.num_inference_steps

    def _start(self, scene: Scene | None, name: str, kind: str, chosen: int | None = None) -> tuple[Any, ...]:
        world = self.worlds.named(name)
        kinds = action_kinds(world, scene)
        return (
            scene,
            start_canvas(scene, world, self.scenes[name], chosen),
            [],
            gr.Radio(kinds, value=kind if kind in kinds else kinds[0]),
        )

    def _settings(self, asked: dict[Any, Any]) -> dict[str, Setting]:
        def setting(controls: list[Any]) -> Setting:
            name, scheduler, steps, seed = (asked[control] for control in controls)
            return Setting(self.worlds.named(name), scheduler, int(steps or 0), int(seed or 0) % 2**63)

        return name_settings(setting(self.first), setting(self.second) if asked[self.compare] else None)

    def _check(self, asked: dict[Any, Any]) -> Task:
        settings = self._settings(asked)
        world = next(iter(settings.values())).world
        scene, kind = asked[self.scene], asked[self.kind]
        if scene is None:
            raise ValueError("Upload an image or video to start from.")
        given = (asked[each] for each in (self.path, self.file, self.length, self.scale))
        actions = choose_actions(kind, scene, world, *given)
        pipelines = {name: pipeline_of(setting) for name, setting in settings.items()}
        return Task(settings, pipelines, scene, known_truth(kind, scene)[: len(actions)], actions)

    async def predict(
        self,
        asked: dict[Any, Any],
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (Gradio's way to inject it)
    ) -> AsyncIterator[dict[Any, Any]]:
        """Predict with each setting; show each chunk of frames, and finally the report.

        After an error, the page is idle.
        """
        begin, visitor = time.perf_counter(), request.session_hash
        self._stop(visitor)
        mine: list[Any] = []
        self.running[visitor] = mine
        try:
            task = self._check(asked)
            mine += task.pipelines.values()
            panels = task.panels()
            yield self._busy(await asyncio.to_thread(videos, panels, task.fps, len(task.scene.history)))
            async for shown in self._predict(task, panels, progress, lambda: self.running.get(visitor) is mine):
                yield {self.view: shown}
            if self.running.get(visitor) is not mine:  # stopped, or replaced by a new path
                yield self._idle("Stopped.")  # Gradio sends the last output again when the generator ends
                return
            with tempfile.TemporaryDirectory() as folder:  # Gradio copies the files that it serves
                report = await asyncio.to_thread(self._report, Path(folder), task, panels, time.perf_counter() - begin)
                yield self._idle() | report
        except Exception as error:
            if not isinstance(error, ValueError):
                LOGGER.exception("the prediction failed")
            said = str(error) if isinstance(error, ValueError) else "internal error"
            yield self._idle(f"No prediction: {said}") | {self.view: None}
        finally:  # also if the visitor leaves
            _interrupt(mine)
            if self.running.get(visitor) is mine:
                del self.running[visitor]

    async def _predict(
        self, task: Task, panels: dict[str, np.ndarray], progress: gr.Progress, wanted: Callable[[], bool]
    ) -> AsyncIterator[dict[str, Any]]:
        """Append the predicted frames to the panels chunk by chunk; yield the values of the viewer.

        It stops when `wanted` returns False.
        """
        total, done = len(task.actions) * len(task.settings), 0
        for name, setting in task.settings.items():
            async for frames in predict(task.pipelines[name], setting, task.scene.history, task.actions):
                panels[name] = np.concatenate([panels[name], frames])
                shown = await asyncio.to_thread(videos, panels, task.fps, len(task.scene.history))
                if not wanted():
                    return
                done += len(frames)
                progress((done, total), desc="Predicting", unit="frames")
                yield shown
            if not wanted():
                return

    def _report(self, folder: Path, task: Task, panels: dict[str, np.ndarray], seconds: float) -> dict[Any, Any]:
        """Return the plots and files of complete predictions."""
        names, actions = list(task.settings), task.actions
        config, seen = task.world.pipeline.transformer.config, len(task.scene.history)
        figures = {name: errors(panels[name][seen:], task.truth) for name in names} if len(task.truth) else {}
        if figures:
            last = panels["Truth"][seen - 1 : seen]
            figures[BASELINE] = errors(np.repeat(last, len(task.truth), axis=0), task.truth)
        whole = align(panels)
        strip = film_strip(whole, seen, columns=8)
        strip.save(folder / "film-strip.png")
        return {
            self.status: _summary(len(names) * len(actions), seconds, figures),
            self.results: gr.Column(visible=True),
            self.error_plot: _error_plot(figures),
            self.action_plot: action_table(actions, config.action_names),
            self.strip: f'<img src="{data_url(strip)}" alt="Film strip of the videos" style="width: 100%">',
            self.picture: str(folder / "film-strip.png"),
            self.video: str(write_video(folder / "prediction.mp4", side_by_side(whole), task.fps)),
            self.table: str(_write_actions(folder / "actions.csv", actions, config.action_names)),
        }

    def interrupt(self, request: gr.Request) -> None:
        """Stop the visitor's prediction at its next step."""
        self._stop(request.session_hash)

    def _busy(self, shown: dict[str, Any]) -> dict[Any, Any]:
        """Return the updates at the start of a prediction: hide the old status and results."""
        return {
            self.stop: gr.Button(visible=True),
            self.results: gr.Column(visible=False),
            self.status: "",
            self.view: shown,
        }

    def _idle(self, status: str = "") -> dict[Any, Any]:
        """Return the updates at the end of a prediction: show a status, and hide plots and files."""
        return {
            self.stop: gr.Button(visible=False),
            self.results: gr.Column(visible=False),
            self.status: _alert(status),
        }

    def _stop(self, session: str | None) -> None:
        _interrupt(self.running.pop(session, ()))


def _alert(text: str) -> str:
    """Return a text as HTML that screen readers announce."""
    return f'<p role="alert">{html.escape(text)}</p>' if text else ""


def _interrupt(pipelines: Iterable[Any]) -> None:
    for pipeline in pipelines:
        pipeline._interrupt = True


def _is_scaled(world: World) -> bool:
    """Return whether a drawn path needs a scale."""
    space = world.pipeline.action_space
    return space.kind == "relative" and can_draw(space) is None


def _summary(frames: int, seconds: float, figures: dict[str, np.ndarray]) -> str:
    parts = [f"{frames} {'frame' if frames == 1 else 'frames'} in {seconds:.1f} s"]
    parts += [f"{name} ({np.nanmean(values):.1f} dB)" for name, values in figures.items() if np.isfinite(values).any()]
    return " · ".join(html.escape(part) for part in parts)


def _error_plot(figures: dict[str, np.ndarray]) -> gr.LinePlot:
    if not figures:
        return gr.LinePlot(visible=False)
    colors = dict(zip(figures, COLORS, strict=False)) | {BASELINE: BASELINE_COLOR}
    return gr.LinePlot(error_table(figures), color_map=colors, visible=True)


def _write_actions(path: Path, actions: np.ndarray, names: list[str] | None) -> Path:
    header = ",".join(names or [f"action_{index}" for index in range(actions.shape[1])])
    np.savetxt(path, actions, delimiter=",", header=header, comments="", fmt="%.6g")
    return path

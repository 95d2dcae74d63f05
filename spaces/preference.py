"""The Preference page: raters compare two predictions with the ground truth.

They do not see the model names (paper, appendix 13).
"""

import asyncio
import hmac
import html
import re
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from preference_study import Comparison, PreferenceStudy
from study_videos import TRUTH, Videos
from viewer import videos as show
from viewer import viewer

FPS = 10
RATER = re.compile(r"[0-9a-f]{16}")
INTRODUCTION = """## Which prediction is closer to the recording?

The upper row shows two predictions from the same first frames and actions. The recording is below. Select the prediction
that is closer to the recording. Compare the robot's path, the objects it touches, and the sharpness. You can replay the videos,
pause them, and step through the frames. If you see no clear difference, select Similar."""
PRIVACY = (
    "*The server stores your answers under a random number, which this browser remembers. You can close the page and continue "
    "later.*"
)
CSS = (Path(__file__).parent / "preference.css").read_text(encoding="utf-8")
OUTCOMES = {"win": "better", "tie": "similar", "loss": "worse"}


def preference_page(study: PreferenceStudy, videos: Videos, key: str | None = None) -> None:
    """Build the page, inside a tab.

    Args:
        study: Selects the comparisons and stores the answers.
        videos: Returns the videos of the comparisons.
        key: Key that the owner enters to see the results; None shows them to everyone.
    """
    PreferencePage(study, videos, key)


class PreferencePage:
    """The components of the page and their event handlers."""

    def __init__(self, study: PreferenceStudy, videos: Videos, key: str | None) -> None:
        self.study, self.videos, self.key = study, videos, key
        # a fixed secret, so that raters can return after a restart of the server; the number needs no protection
        self.rater = gr.BrowserState(None, storage_key="irasim-rater", secret="irasim-preference")
        self.current = gr.State()
        with gr.Column(elem_id="preference"):
            self._build_rating()
            self._build_results()
        self._connect()

    def _build_rating(self) -> None:
        self.bar = gr.HTML(_bar(0, len(self.study.comparisons(""))), css_template=CSS, elem_id="preference-bar")
        with gr.Column() as self.welcome:
            gr.Markdown(INTRODUCTION)
            self.begin = gr.Button("Begin", variant="primary", elem_id="preference-begin")
            gr.Markdown(PRIVACY)
        with gr.Column(visible=False) as self.rating:
            self.view = viewer("", elem_id="preference-view", elem_classes="pair")
            with gr.Row(equal_height=True, elem_id="preference-choices"):
                self.choices = {
                    "left": gr.Button("Left is better", size="md", min_width=80, elem_id="preference-left"),
                    "similar": gr.Button("Similar", size="md", min_width=80, elem_id="preference-similar"),
                    "right": gr.Button("Right is better", size="md", min_width=80, elem_id="preference-right"),
                }
        self.thanks = gr.Markdown(
            "## Thank you! You have compared all videos.\n\nYour answers are stored.",
            visible=False,
            elem_id="preference-thanks",
        )
        self.back = gr.Button(
            "← Previous comparison", size="sm", variant="secondary", visible=False, elem_id="preference-back"
        )

    def _build_results(self) -> None:
        with gr.Accordion("Results, for the owner of the study", open=False, elem_id="preference-results"):
            with gr.Row():
                self.password = gr.Textbox(
                    label="Owner's key", type="password", visible=self.key is not None, elem_id="preference-key"
                )
                self.ask = gr.Button("Show results", elem_id="preference-show")
            self.rates = gr.HTML(css_template=CSS, elem_id="preference-rates")
            self.export = gr.DownloadButton("Answers (.csv)", visible=False, elem_id="preference-export")

    def _connect(self) -> None:
        private: Any = {"api_visibility": "private"}
        shown = [self.rater, self.current, self.bar, self.welcome, self.rating, self.thanks, self.back, self.view]
        gr.on(None, self.greet, self.rater, [self.bar, self.begin], queue=False, show_progress="hidden", **private)
        step: Any = {"outputs": shown, "show_progress_on": [self.bar]} | private
        started = self.begin.click(self.show_next, self.rater, **step)
        # the focused button is hidden, so move the focus
        started.then(None, js="() => document.querySelector('#preference-left')?.focus()", **private)
        self.back.click(self.show_previous, [self.rater, self.current], **step)
        for choice, button in self.choices.items():
            button.click(self.answering(choice), [self.rater, self.current], **step)
        self.ask.click(self.results, self.password, [self.rates, self.export], **private)
        self.password.submit(self.results, self.password, [self.rates, self.export], **private)

    def greet(self, rater: Any) -> tuple[Any, ...]:
        """Show the progress of a returning rater."""
        if not _is_rater(rater):
            return gr.skip(), gr.skip()
        total, left = len(self.study.comparisons(rater)), len(self.study.remaining(rater))
        return _bar(total - left, total), gr.Button("Begin" if left == total else "Continue" if left else "Finish")

    async def show_next(self, rater: Any) -> tuple[Any, ...]:
        """Show the next comparison to a rater; a new rater gets a number."""
        rater = rater if _is_rater(rater) else secrets.token_hex(8)
        remaining = await asyncio.to_thread(self.study.remaining, rater)
        return await self._show(rater, next(iter(remaining), None))

    async def show_previous(self, rater: Any, current: Comparison | None) -> tuple[Any, ...]:
        """Show the previous comparison; a new answer replaces the earlier one."""
        shown = self.study.comparisons(rater)
        place = shown.index(current) if current in shown else len(shown)
        return await self._show(rater, shown[max(0, place - 1)])

    def answering(self, choice: str) -> Any:
        """Return the event handler of a choice's button."""

        async def answer(rater: Any, current: Comparison | None) -> tuple[Any, ...]:
            if current is not None and _is_rater(rater):
                try:
                    await asyncio.to_thread(self.study.answer, rater, current, choice)
                except (ValueError, OSError) as error:
                    gr.Warning(str(error), title="The answer was not stored")
                    return await self._show(rater, current)
            return await self.show_next(rater)

        return answer

    async def _show(self, rater: str, comparison: Comparison | None) -> tuple[Any, ...]:
        shown = self.study.comparisons(rater)
        answered = len(shown) - len(await asyncio.to_thread(self.study.remaining, rater))
        view: Any = gr.skip()
        if comparison is not None:
            sides = {"Left": comparison.left, "Right": comparison.right, "Recording": TRUTH}
            panels = {title: await self.videos(model, comparison.clip) for title, model in sides.items()}
            view = await asyncio.to_thread(show, panels, FPS)
        return (
            rater,
            comparison,
            _bar(answered, len(shown)),
            gr.Column(visible=False),
            gr.Column(visible=comparison is not None),
            gr.Markdown(visible=comparison is None),
            gr.Button(visible=comparison is None or shown.index(comparison) > 0),
            view,
        )

    def results(self, password: str) -> Iterator[tuple[Any, ...]]:
        """Show the rates, and the answers as a file, to users with the key."""
        if self.key is not None and not hmac.compare_digest(str(password).encode(), self.key.encode()):
            yield '<p role="alert">Wrong key.</p>', gr.DownloadButton(visible=False)
            return
        with tempfile.TemporaryDirectory() as folder:  # Gradio copies the files that it serves
            path = Path(folder) / "answers.csv"
            self.study.export(path)
            page = rates_page(self.study.rates(), self.study.model)
            yield page, gr.DownloadButton(value=str(path), visible=True)


def _is_rater(rater: Any) -> bool:
    """Return whether a value from a browser is a rater's number."""
    return isinstance(rater, str) and RATER.fullmatch(rater) is not None


def _bar(answered: int, total: int) -> str:
    share, text = 100 * answered / total, f"{answered} of {total} compared"
    return (
        f'<div class="preference-bar" role="progressbar" aria-label="{text}" aria-valuemin="0" aria-valuemax="{total}" '
        f'aria-valuenow="{answered}"><span>{text}</span><i><b style="width: {share:.0f}%"></b></i></div>'
    )


def rates_page(rates: dict[str, dict[str, Any]], model: str) -> str:
    """Format the rates of a model against each other model as HTML.

    Args:
        rates: From `PreferenceStudy.rates`.
        model: The rated model.
    """
    if not rates:
        return "<p>No answers yet.</p>"
    parts = []
    for other, of in rates.items():
        title = f"{html.escape(model)} against {html.escape(other)}"
        note = f"{of['answers']} answers of {of['raters']} rater{'s' * (of['raters'] != 1)} on {of['win']['n']} clips"
        bars = "".join(f'<b class="{kind}" style="width: {100 * of[kind]["mean"]:.1f}%"></b>' for kind in OUTCOMES)
        figures = "".join(
            f'<li class="{kind}"><strong>{of[kind]["mean"]:.0%}</strong> {word} <small>[{of[kind]["low"]:.0%}, '
            f"{of[kind]['high']:.0%}]</small></li>"
            for kind, word in OUTCOMES.items()
        )
        parts.append(
            f'<section class="rates"><h2>{title}</h2><div>{bars}</div><ul>{figures}</ul>'
            f"<p>{note}; 95 % intervals over clips</p></section>"
        )
    return "".join(parts)

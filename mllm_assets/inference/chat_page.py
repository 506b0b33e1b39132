"""A page on this machine where an image and questions go to one to three models, side by side."""

import html
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while Gradio is imported

import gradio as gr  # noqa: E402
from gradio import themes  # noqa: E402
from gradio.processing_utils import save_file_to_cache  # noqa: E402
from gradio.utils import get_upload_folder  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from starlette.middleware.trustedhost import TrustedHostMiddleware  # noqa: E402

from mllm_assets.data.ingest.spec import MAX_IMAGE_BYTES
from mllm_assets.data.sharegpt.conversation import IMAGE_PLACEHOLDER
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.data.sharegpt.rows import ASSISTANT, USER, Message, Row
from mllm_assets.errors import DataError, MllmAssetsError
from mllm_assets.inference.addresses import is_loopback, names_of, url
from mllm_assets.inference.answerer import Answer, Answerer
from mllm_assets.inference.generate import ask, open_model, prompt_row
from mllm_assets.recipe.asking import Sampling
from mllm_assets.training.runs.models import NamedModel

SAMPLES_PER_PAGE = 24
MAX_MODELS = 3
FACTS = "\n\n"  # between an answer and how long it took
MAX_WAITING = 32  # questions; Gradio tells those above it that the queue is full
# fonts of the reader's own machine: Gradio's usual ones come from Google
THEME = themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = ".gradio-container {width: 100%; max-width: 1400px !important; margin: auto}"

Turns: TypeAlias = Sequence[tuple[str, Sequence[str]]]


@dataclass(frozen=True, slots=True)
class Samples:
    """The rows of a dataset's entry that have one image each."""

    entry: str
    rows: Sequence[Row]

    @classmethod
    def read(cls, dataset: Dataset, entry: str) -> Self:
        """Read an entry of a directory.

        Raises:
            DataError: There is no such entry, it cannot be read, or it has no row with one image.
        """
        rows = [row for row in dataset.entry(entry).rows if len(row.images) == 1]
        if not rows:
            raise DataError(f"The entry {entry} has no row with exactly one image to browse. Leave --samples out.")
        return cls(entry, rows)

    def page(self, number: int) -> list[str]:
        """Return the images of a page, from 1."""
        start = (int(number) - 1) * SAMPLES_PER_PAGE
        return [_shown(row.images[0]) for row in self.rows[start : start + SAMPLES_PER_PAGE]]

    def pick(self, page: int, index: int) -> tuple[str, str, str]:
        """Return the image, the question and the reference answer of a sample on a page."""
        row = self.rows[(int(page) - 1) * SAMPLES_PER_PAGE + index]
        texts = {message.role: message.content for message in row.messages}
        return _shown(row.images[0]), texts[USER].replace(IMAGE_PLACEHOLDER, "").strip(), texts.get(ASSISTANT, "")


def _shown(picture: Path) -> str:
    """A copy among the files that the page may serve: the folder of the picture holds others."""
    return save_file_to_cache(picture, get_upload_folder())


def build_page(models: Sequence[tuple[NamedModel, Answerer]], samples: Samples | None) -> gr.Blocks:
    """Build the page of `mllm-assets chat`."""
    loaded = {model.name: answerer for model, answerer in models}
    names = [model.name for model, _ in models]
    with gr.Blocks(analytics_enabled=False, title="mllm-assets chat") as page:
        gr.Markdown(f"## {' and '.join(names)}")
        image, prompt, reset = add_chat(gr.State(names), names, loaded.__getitem__, has_reference=samples is not None)
        if samples is not None:
            _browser(samples, image, prompt, reset)
    return page.queue(max_size=MAX_WAITING)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reset:
    """The components of a conversation: `outputs` are the reference, the turns, the question and the columns."""

    outputs: Sequence[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionParts:
    """What a question is made with; `options` are system text, length, temperature and top-p."""

    image: Any
    prompt: Any
    options: Sequence[Any]
    ask: gr.Button
    again: gr.Button
    reference: Any


def _question_parts(*, has_reference: bool) -> QuestionParts:
    with gr.Row(equal_height=True):
        # the unchanged file: Gradio would decode all others than RGB before their size is checked
        image = gr.Image(type="filepath", image_mode=None, label="Image", sources=["upload", "clipboard"], height=300)
        with gr.Column():
            prompt = gr.Textbox(label="Question", lines=2, autofocus=True)
            with gr.Accordion("Options", open=False):
                system = gr.Textbox(label="System text")
                length = gr.Slider(1, 512, value=100, step=1, label="Most new tokens")
                temperature = gr.Slider(0, 2, value=0, step=0.1, label="Temperature; 0 takes the likeliest")
                top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top-p: what is drawn from; 1 is everything")
            with gr.Row():
                ask = gr.Button("Ask", variant="primary", scale=0)
                again = gr.Button("New conversation", scale=0, min_width=240)
            reference = gr.Textbox(label="Reference", lines=1, interactive=False, visible=has_reference)
    options = (system, length, temperature, top_p)
    return QuestionParts(image=image, prompt=prompt, options=options, ask=ask, again=again, reference=reference)


def _column(number: int, label: str) -> gr.Chatbot:
    return gr.Chatbot(
        label=label,
        height=260,
        visible=bool(label),
        render_markdown=False,
        feedback_options=None,
        buttons=["copy"],
        elem_id=f"answers-{number}",
        placeholder="No question yet",
    )


def add_chat(
    chosen: Any, labels: Sequence[str], open_named: Callable[[str], Answerer], *, has_reference: bool
) -> tuple[Any, Any, Reset]:
    """Add a conversation with the models whose names are the value of `chosen`, next to each other.

    `labels` are those of as many columns as there can be models; `open_named` is called when a model is asked.
    """
    turns = gr.State([])  # of the question, and each model's answer to it
    parts = _question_parts(has_reference=has_reference)
    image, prompt, reference = parts.image, parts.prompt, parts.reference
    with gr.Row():
        columns = [_column(number, label) for number, label in enumerate(labels)]

    def answer(
        names: Sequence[str], turns: Turns, image: str | None, prompt: str | None, system: str | None, *options: float
    ) -> Iterator[list[Any]]:
        length, temperature, top_p = options
        if not prompt or not prompt.strip():
            raise gr.Error("Write a question first.", print_exception=False)
        if not names:
            raise gr.Error("Choose a model first.", print_exception=False)
        sampling = Sampling(
            max_new_tokens=int(length), do_sample=temperature > 0, temperature=temperature or 1.0, top_p=top_p
        )
        told = [""] * len(names)
        try:
            for index, name in enumerate(names):
                told[index] = "..."
                yield _said([*turns, (prompt, told)], "", len(columns))
                row = prompt_row(
                    [Path(image)] if image else [],
                    prompt,
                    system=(system or "").strip() or None,
                    earlier=_earlier(turns, index, bool(image)),
                )
                for found in ask_while_read(open_named(name), row, sampling):
                    if not isinstance(found, str):
                        tokens = f"{found.num_tokens} token{'s' * (found.num_tokens != 1)}"
                        found = f"{found.text}{FACTS}{tokens} in {found.latency_s:.2f} s"
                    told[index] = found or "..."
                    yield _said([*turns, (prompt, told)], "", len(columns))
        except MllmAssetsError as error:
            yield _said(turns, prompt, len(columns))
            raise gr.Error(html.escape(str(error)), print_exception=False) from None

    def forget(turns: Turns, prompt: str) -> list[Any]:
        """Begin again, with the first question if no other is written; what somebody is writing stays."""
        empty = _said([], "", len(columns))
        return ["", [], turns[0][0] if turns and not prompt else gr.skip(), *empty[2:]]

    question: list[Any] = [chosen, turns, image, prompt, *parts.options]
    outputs = [turns, prompt, *columns]
    for happens in (parts.ask.click, prompt.submit):  # one at a time: a model answers one question at a time
        happens(answer, question, outputs, concurrency_limit=1, concurrency_id="model")
    reset = Reset(outputs=[reference, *outputs])
    gr.on(
        [image.upload, image.clear, parts.again.click], forget, [turns, prompt], reset.outputs, show_progress="hidden"
    )
    return image, prompt, reset


def _earlier(turns: Turns, index: int, has_image: bool) -> list[Message]:
    """What was said with one model; the image belongs to the first question."""
    messages = []
    for question, answers in turns:
        placed = IMAGE_PLACEHOLDER if has_image and not messages and IMAGE_PLACEHOLDER not in question else ""
        text = answers[index].rpartition(FACTS)[0] or answers[index]
        messages += [Message(USER, placed + question), Message(ASSISTANT, text)]
    return messages


def _said(turns: Turns, prompt: str, num_columns: int) -> list[Any]:
    """Values of the turns, the question and the columns."""
    columns = [
        [
            {"role": role, "content": html.escape(text)}
            for question, answers in turns
            if index < len(answers)
            for role, text in ((USER, question), (ASSISTANT, answers[index]))
            if text
        ]
        for index in range(num_columns)
    ]
    return [[(question, list(answers)) for question, answers in turns], prompt, *columns]


def ask_while_read(answerer: Answerer, row: Row, sampling: Sampling) -> Iterator[str | Answer]:
    """Ask in a thread, and yield the words of the answer so far now and then, at last the answer.

    Gradio closes the iterator when the page is closed; the answer then ends at its next word.

    Raises:
        DataError: As `ask`.
    """
    words: list[str] = []
    end: list[Answer | Exception] = []
    gone = threading.Event()

    def on_text(text: str) -> None:
        if gone.is_set():
            raise InterruptedError
        words.append(text)

    def run() -> None:
        try:
            end.append(ask(answerer, row, sampling, on_text=on_text))
        except Exception as error:
            end.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)
            yield "".join(words)
    finally:
        gone.set()
        thread.join()
    [found] = end
    if isinstance(found, Exception):
        raise found
    yield found


def _browser(samples: Samples, image: Any, prompt: Any, reset: Reset) -> None:
    gr.Markdown(f"### Samples of {samples.entry} ({len(samples.rows)})")
    gallery = gr.Gallery(
        samples.page(1),
        columns=8,
        height="auto",
        allow_preview=False,
        show_label=False,
        object_fit="contain",
        buttons=[],
    )
    num_pages = -(-len(samples.rows) // SAMPLES_PER_PAGE)
    number = gr.Slider(1, max(2, num_pages), value=1, step=1, label="Page", visible=num_pages > 1)
    number.change(samples.page, number, gallery, show_progress="hidden")
    num_columns = len(reset.outputs) - 3

    def pick(page: float, event: gr.SelectData) -> list[Any]:
        picture, question, reference = samples.pick(int(page), event.index)
        return [picture, reference, *_said([], question, num_columns)]

    gallery.select(pick, number, [image, *reset.outputs], show_progress="hidden")


def chat(
    models: Sequence[NamedModel],
    *,
    samples: Samples | None,
    host: str,
    port: int,
    password: str | None,
    device: str = "auto",
) -> None:
    """Show a page with one to three models until the process is stopped.

    Samples can be picked, where they are given. A visitor must know the `password`, with the name `user`; None asks
    for none.

    Raises:
        MllmAssetsError: A model cannot be read.
    """
    page = build_page([(model, open_model(model, device=device)) for model in models], samples)
    show(page, host=host, port=port, password=password)


def show(page: gr.Blocks, *, host: str, port: int, password: str | None, local: Sequence[Middleware] = ()) -> None:
    """Show a page until the process is stopped; it serves no file but pictures that it has shown.

    `local` is added where only this machine reaches the page, since it is before Gradio asks for a password.
    """
    # or a foreign web page could send requests by a name that it points to this machine
    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=names_of(host)), *local] if is_loopback(host) else []
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        auth=("user", password) if password else None,
        app_kwargs={"middleware": guards},
        max_file_size=MAX_IMAGE_BYTES,
        show_error=True,
        theme=THEME,
        css=CSS,
        footer_links=[],
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"the page is on {url(host, port)}; Ctrl-C ends it", flush=True)
    page.block_thread()

"""A page on this machine where an image and a question go to one or two models, side by side."""

import html
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while Gradio is imported

import gradio as gr  # noqa: E402
from gradio import themes  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from starlette.middleware.trustedhost import TrustedHostMiddleware  # noqa: E402

from mllm_assets.data.sharegpt import ASSISTANT, USER, Row, load_rows
from mllm_assets.data.spec import MAX_IMAGE_BYTES
from mllm_assets.data.tokens import IMAGE_PLACEHOLDER
from mllm_assets.errors import DataError, MllmAssetsError
from mllm_assets.inference.addresses import is_loopback, names_of, url
from mllm_assets.inference.answerer import Answerer, Sampling
from mllm_assets.inference.generate import ask, open_model, prompt_row
from mllm_assets.inference.naming import NamedModel

SAMPLES_PER_PAGE = 24
# fonts of the reader's own machine: Gradio's usual ones come from Google
THEME = themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = ".gradio-container {max-width: 1200px !important; margin: auto}"


@dataclass(frozen=True, slots=True)
class Samples:
    """The rows of a dataset's entry that have one image each."""

    entry: str
    rows: Sequence[Row]

    @property
    def num_pages(self) -> int:
        return -(-len(self.rows) // SAMPLES_PER_PAGE)

    def page(self, number: int) -> list[str]:
        """Return the images of a page, from 1."""
        start = (int(number) - 1) * SAMPLES_PER_PAGE
        return [str(row.images[0]) for row in self.rows[start : start + SAMPLES_PER_PAGE]]

    def pick(self, page: int, index: int) -> tuple[str, str, str]:
        """Return the image, the question and the reference answer of a sample on a page."""
        row = self.rows[(int(page) - 1) * SAMPLES_PER_PAGE + index]
        said = {message.role: message.content for message in row.messages}
        return str(row.images[0]), said[USER].replace(IMAGE_PLACEHOLDER, "").strip(), said.get(ASSISTANT, "")


def load_samples(data_dir: Path, entry: str) -> Samples:
    """Read an entry of `data_dir/dataset_info.json` to browse.

    Raises:
        DataError: There is no such entry, it cannot be read, or it has no row with one image.
    """
    rows = [row for row in load_rows(data_dir, entry) if len(row.images) == 1]
    if not rows:
        raise DataError(f"The entry {entry} has no row with exactly one image to browse. Leave --samples out.")
    return Samples(entry, rows)


def build_page(models: Sequence[tuple[NamedModel, Answerer]], samples: Samples | None) -> gr.Blocks:
    """Build the page."""
    with gr.Blocks(analytics_enabled=False, title="mllm-assets chat") as page:
        gr.Markdown(f"## {' and '.join(model.name for model, _ in models)}")
        with gr.Row(equal_height=True):
            # the file as it is: Gradio would decode all others than RGB before their size is looked at
            image = gr.Image(
                type="filepath", image_mode=None, label="Image", sources=["upload", "clipboard"], height=300
            )
            with gr.Column():
                prompt = gr.Textbox(label="Question", lines=2, autofocus=True)
                with gr.Accordion("Options", open=False):
                    system = gr.Textbox(label="System text")
                    length = gr.Slider(1, 512, value=100, step=1, label="Most new tokens")
                    temperature = gr.Slider(0, 2, value=0, step=0.1, label="Temperature; 0 takes the likeliest")
                button = gr.Button("Ask", variant="primary", scale=0)
        with gr.Row(equal_height=True):
            answers = [gr.Textbox(label=model.name, lines=4, interactive=False) for model, _ in models]
            reference = gr.Textbox(label="Reference", lines=4, interactive=False, visible=samples is not None)

        def answer(
            image: str | None, prompt: str | None, system: str | None, length: float, temperature: float
        ) -> Iterator[list[str]]:
            said = [""] * len(models)
            if not prompt or not prompt.strip():
                raise gr.Error("Write a question first.", print_exception=False)
            sampling = Sampling(do_sample=temperature > 0, temperature=temperature or 1.0)
            for index, (_, answerer) in enumerate(models):
                said[index] = "..."
                yield said
                try:
                    row = prompt_row([Path(image)] if image else [], prompt, system=(system or "").strip() or None)
                    found = ask(answerer, row, max_new_tokens=int(length), sampling=sampling)
                except MllmAssetsError as error:
                    raise gr.Error(html.escape(str(error)), print_exception=False) from None
                said[index] = (
                    f"{found.text}\n\n{found.num_tokens} token{'s' * (found.num_tokens != 1)} in {found.time_s:.2f} s"
                )
                yield said

        question: list[Any] = [image, prompt, system, length, temperature]
        for happens in (button.click, prompt.submit):  # one at a time: a model answers one question at a time
            happens(answer, question, answers, concurrency_limit=1, concurrency_id="model")
        said_before = [reference, *answers]  # of another image
        gr.on([image.upload, image.clear], lambda: [""] * len(said_before), None, said_before, show_progress="hidden")
        if samples is not None:
            _browser(samples, image, prompt, reference, answers)
    return page


def _browser(samples: Samples, image: Any, prompt: Any, reference: Any, answers: Sequence[Any]) -> None:
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
    number = gr.Slider(1, max(2, samples.num_pages), value=1, step=1, label="Page", visible=samples.num_pages > 1)
    number.change(samples.page, number, gallery, show_progress="hidden")

    def pick(page: float, event: gr.SelectData) -> list[str]:
        return [*samples.pick(int(page), event.index), *[""] * len(answers)]

    gallery.select(pick, number, [image, prompt, reference, *answers], show_progress="hidden")


def chat(
    models: Sequence[NamedModel],
    *,
    data_dir: Path,
    entry: str | None,
    host: str,
    port: int,
    password: str | None,
    device: str = "auto",
) -> None:
    """Show the page until the process is told to stop.

    Args:
        models: One or two.
        data_dir: The folder of `dataset_info.json`.
        entry: The entry whose samples can be picked, or None.
        host: Address to listen on.
        port: Port to listen on.
        password: What a visitor must know, with the name `user`; None for no question.
        device: auto, cuda, mps or cpu.

    Raises:
        MllmAssetsError: A model or the entry cannot be read.
    """
    samples = load_samples(data_dir, entry) if entry else None
    page = build_page([(model, open_model(model, device=device)) for model in models], samples)
    # or a page of a stranger could ask by a name that it points to this machine
    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=names_of(host))] if is_loopback(host) else []
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        auth=("user", password) if password else None,
        allowed_paths=[str(data_dir)] if samples else None,
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

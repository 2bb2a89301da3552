"""Layout of the demo page in gradio, and how it is served. Imported only where gradio is there."""

from __future__ import annotations

import argparse
import html
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import gradio as gr
from gradio.events import Dependency
from PIL import Image
from starlette.middleware import Middleware

from blip_scale.commands.page_security import SameHostOnly
from blip_scale.commands.page_service import BEAM, NUCLEUS, Service
from blip_scale.data.reading.stream_store import CorruptSample
from blip_scale.inference.blip import Blip, Use
from blip_scale.inference.training_record import TrainingRecord

_MOST_UPLOADED = "20mb"
_STYLE = """
.gradio-container { width: 100% !important; max-width: 1120px !important;
  margin: 0 auto !important; }
footer { display: none !important; }
.about { line-height: 1.5; }
.about h1 { margin: 0 0 .3em; font-size: 1.6em; font-weight: 650; }
.about p { margin: .25em 0; overflow-wrap: anywhere; }
.about .alarm { border-left: 4px solid #c2554a; padding: .2em .7em; background: #c2554a18; }
.about details { margin: .5em 0 1em; }
.about summary { cursor: pointer; }
.about .scroll { overflow-x: auto; }
.about table { border-collapse: collapse; margin: .6em 0; font-size: .92em; }
.about td, .about th { padding: .25em .8em; text-align: right;
  border-bottom: 1px solid var(--border-color-primary); }
.about td:first-child, .about th:first-child { text-align: left; padding-left: 0; }
.note { color: var(--body-text-color-subdued); font-size: .9em; line-height: 1.45;
  padding: .2em .9em .7em; }
"""
_MATCH_NOTE = (
    "<b>match</b> is how sure the model is that a text describes the image: 1 is yes, 0 is no, and "
    "0.5 is undecided. <b>cosine</b> compares image and text as two vectors, from -1 to 1. It "
    "orders a search and has no threshold."
)
_WORDS_NOTE = (
    "Red places raise the matching score through that word (Grad-CAM of the cross-attention). "
    "Every map is scaled to its own greatest value. No colour: the word raises nothing."
)
_NO_IMAGES = (
    "Start the page with <code>--images FOLDER</code> to see example images here and to search "
    "them by text. A folder of shards will do, such as <code>data/demo/heldout_drawing</code>."
)

_USES: dict[Use, str] = {
    "caption": "write captions",
    "match": "match texts and see their words",
    "vqa": "answer questions",
    "embed": "search",
}
"""Use -> what the page does with it."""

Ask = Callable[..., Any]


def build(service: Service) -> gr.Blocks:
    """The page of a service."""
    with gr.Blocks(title="BLIP", analytics_enabled=False) as page:
        gr.HTML(about(service))
        with gr.Tab("One image"), gr.Row(equal_height=False):
            with gr.Column(min_width=300):
                image = gr.Image(
                    type="filepath", image_mode=None, format="png", label="Image", height=380,
                    sources=["upload"], buttons=[],
                )  # fmt: skip
                chosen = _examples(image, service)
            with gr.Column(min_width=300):
                caption: gr.Textbox | gr.State = gr.State("")
                if service.able("caption"):
                    caption = _caption_panel(image, chosen, service)
                if service.able("match"):
                    _words_panel(image, caption, service)
                    _match_panel(image, service)
                if service.able("vqa"):
                    _question_panel(image, service)
                gr.HTML(_note(_missing(service)))
        if service.able("embed"):
            with gr.Tab("Search"):
                _search_panel(service)
    return page


def _note(text: str) -> str:
    return f'<div class="note">{text}</div>' if text else ""


def _missing(service: Service) -> str:
    """A sentence about what no checkpoint of the page can do; empty if there is nothing."""
    missing = [words for use, words in _USES.items() if not service.able(use)]
    if not missing:
        return ""
    return f"To {' or to '.join(missing)}, start the page with a checkpoint that can."


def _told(ask: Ask, *inputs: Any) -> Any:
    """Answer of `ask`; what it refuses appears on the page."""
    try:
        return ask(*inputs)
    except (ValueError, CorruptSample) as error:
        raise gr.Error(str(error), title="That did not work", print_exception=False) from error


def _examples(image: gr.Image, service: Service) -> Dependency | None:
    """Images to click on, and the event that one has become the image of the page; None and a hint
    without images."""
    if not service.images:
        gr.HTML(_note(_NO_IMAGES))
        return None
    examples = service.examples()
    gallery = gr.Gallery(
        examples, label="Examples: click one", columns=3, height="auto", object_fit="contain",
        allow_preview=False, buttons=[], interactive=False, format="png", elem_id="examples",
    )  # fmt: skip

    def chosen(event: gr.SelectData) -> Image.Image:
        return examples[event.index][0]

    return gallery.select(chosen, None, image, api_visibility="private")


def _caption_panel(image: gr.Image, chosen: Dependency | None, service: Service) -> gr.Textbox:
    with gr.Group():
        caption = gr.Textbox(
            label="Caption", interactive=False, lines=2,
            placeholder="appears here once there is an image",
        )  # fmt: skip
        with gr.Accordion("How to write it", open=False):
            method = gr.Radio([BEAM, NUCLEUS], value=BEAM, show_label=False)
            beams = gr.Number(3, label="beams", precision=0, minimum=1, maximum=10, min_width=80)
            seed = gr.Number(0, label="seed", precision=0, minimum=0, min_width=80, visible=False)
        button = gr.Button("Caption", variant="primary")

    def shown(chosen: str) -> tuple[Any, Any]:
        return gr.update(visible=chosen == BEAM), gr.update(visible=chosen == NUCLEUS)

    ask = partial(_told, service.caption)
    inputs = [image, method, beams, seed]
    method.change(shown, method, [beams, seed], api_visibility="private")
    button.click(ask, inputs, caption, api_name="caption")
    image.upload(ask, inputs, caption, api_visibility="private")
    image.clear(lambda: "", None, caption, api_visibility="private")
    if chosen is not None:
        chosen.then(ask, inputs, caption, api_visibility="private")
    return caption


def _words_panel(image: gr.Image, caption: gr.Textbox | gr.State, service: Service) -> None:
    with gr.Group():
        text = gr.Textbox(
            label="Where are the words?",
            max_lines=2,
            placeholder="the caption above" if service.able("caption") else "a dog in the snow",
        )
        maps = gr.State()
        heat = gr.Image(
            label="Heat map", interactive=False, visible=False, format="png", buttons=[],
            height=300, elem_id="heat",
        )  # fmt: skip
        words = gr.Radio([], label="Word", visible=False, elem_id="words")
        button = gr.Button("Show the words")
        gr.HTML(_note(_WORDS_NOTE))

    def explain(path: str | None, typed: str, written: str) -> tuple[Any, Any, Any]:
        results = _told(service.explain, path, typed if typed.strip() else written)
        choices = [(word, str(index)) for index, (word, _) in enumerate(results)]
        pictures = [picture for _, picture in results]
        radio = gr.update(choices=choices, value="0", visible=True)
        return pictures, radio, gr.update(value=pictures[0], visible=True)

    def chosen_word(pictures: list[Image.Image], index: str) -> Image.Image:
        return pictures[int(index)]

    def cleared() -> tuple[Any, Any, Any]:
        return None, gr.update(choices=[], value=None, visible=False), gr.update(visible=False)

    for event in (button.click, text.submit):
        event(explain, [image, text, caption], [maps, words, heat], api_visibility="private")
    words.input(chosen_word, [maps, words], heat, api_visibility="private", show_progress="hidden")
    image.change(cleared, None, [maps, words, heat], api_visibility="private")


def _match_panel(image: gr.Image, service: Service) -> None:
    with gr.Group():
        texts = gr.Textbox(label="Texts, one a line", placeholder="a dog\na cat", lines=3)
        button = gr.Button("Match")
        rows = gr.Dataframe(
            headers=["text", "match", "cosine"], interactive=False, show_label=False,
            column_widths=["60%", "20%", "20%"], row_count=1, wrap=True,
        )  # fmt: skip
        gr.HTML(_note(_MATCH_NOTE))
    button.click(partial(_told, service.match), [image, texts], rows, api_name="match")
    image.change(lambda: [], None, rows, api_visibility="private")


def _question_panel(image: gr.Image, service: Service) -> None:
    with gr.Group():
        question = gr.Textbox(label="Question", placeholder="what is the dog doing?")
        answer = gr.Textbox(label="Answer", interactive=False)
        button = gr.Button("Ask")
    image.change(lambda: "", None, answer, api_visibility="private")
    ask = partial(_told, service.answer)
    for event in (button.click, question.submit):
        visible = "public" if event == button.click else "private"
        event(ask, [image, question], answer, api_name="answer", api_visibility=visible)


def _search_panel(service: Service) -> None:
    number = len(service.images)
    if not number:
        gr.HTML(_note(_NO_IMAGES))
    with gr.Row(equal_height=True):
        text = gr.Textbox(
            show_label=False, placeholder=f"Search {number} images by text", scale=6, min_width=260
        )
        rerank = gr.Checkbox(label="re-rank by matching", min_width=210)
        button = gr.Button("Search", variant="primary", min_width=120)
    results = gr.Gallery(
        service.thumbnails(), columns=4, height="auto", object_fit="contain", show_label=False,
        buttons=[], interactive=False, elem_id="results",
    )  # fmt: skip
    ask, inputs = partial(_told, service.search), [text, rerank]
    button.click(ask, inputs, results, api_name="search")
    text.submit(ask, inputs, results, api_visibility="private")


def about(service: Service) -> str:
    """HTML: what each checkpoint is and was trained on. Texts of checkpoints are escaped."""
    records = service.records or [None] * len(service.blips)
    parts = [_about_checkpoint(*pair) for pair in zip(service.blips, records, strict=True)]
    return f'<div class="about"><h1>BLIP</h1>{"".join(parts)}</div>'


def _about_checkpoint(blip: Blip, record: TrainingRecord | None) -> str:
    size = f"{blip.image_size}&times;{blip.image_size}"
    lines = [
        f"<p><code>{html.escape(blip.origin)}</code>: {blip.head} checkpoint, "
        f"{size} pixels, on {blip.device.type}.</p>"
    ]
    if record is None:
        return f"{lines[0]}<p>The checkpoint says nothing about its training.</p>"
    lines.append(f"<p>{_training(record)}</p>")
    lines += [f'<p class="alarm">Warning: {html.escape(alarm)}</p>' for alarm in record.alarms]
    if record.figures:
        lines.append(f"<details><summary>Held-out figures</summary>{_figures(record)}</details>")
    return "".join(lines)


def _training(record: TrainingRecord) -> str:
    names = []
    for name, samples in record.data.items():
        count = "" if samples is None else f" ({samples:,} pairs)"
        names.append(f"<b>{html.escape(name)}</b>{count}")
    sentence = f"Trained on {', '.join(names) or 'data that it does not name'}"
    if record.steps is not None:
        sentence += f", for {record.steps:,} steps"
    if record.pairs is not None:
        sentence += f" of {record.pairs_per_step:,} pairs: {record.pairs:,} seen"
    return f"{sentence}."


def _figures(record: TrainingRecord) -> str:
    """A table with a column a held-out set."""
    columns: dict[str, dict[str, float]] = {}
    for key, value in record.figures.items():
        name, _, figure = key.rpartition("/")
        columns.setdefault(name, {})[figure] = value
    rows = dict.fromkeys(chain.from_iterable(columns.values()))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = ""
    for figure in rows:
        cells = ""
        for values in columns.values():
            cells += f"<td>{_number(figure, values[figure]) if figure in values else ''}</td>"
        body += f"<tr><td>{html.escape(_figure_name(figure))}</td>{cells}</tr>"
    return f'<div class="scroll"><table><tr><th></th>{head}</tr>{body}</table></div>'


def _figure_name(figure: str) -> str:
    """A figure's name for people: `itc_image_to_text_r1` is "image to text R@1, by cosine"."""
    kind, _, rest = figure.partition("_")
    ways = {"itc": ", by cosine", "itm": ", re-ranked by matching"}
    if kind not in ways:
        return figure.replace("_", " ")
    direction, _, recall = rest.rpartition("_r")
    return f"{direction.replace('_', ' ')} R@{recall}{ways[kind]}"


def _number(figure: str, value: float) -> str:
    is_recall = figure.rpartition("_r")[2].isdecimal()
    return f"{100 * value:.1f} %" if is_recall else f"{value:,.4g}"


def launch(page: gr.Blocks, options: argparse.Namespace, **more: Any) -> None:
    """Serve the page; `more` goes to gradio."""
    fonts = ["system-ui", "sans-serif"]  # gradio's default fonts come from another host
    page.launch(
        server_name=options.host,
        server_port=options.port,
        theme=gr.themes.Soft(font=fonts, font_mono=["ui-monospace", "monospace"]),
        css=_STYLE,
        footer_links=[],
        show_error=True,
        max_file_size=_MOST_UPLOADED,
        inbrowser=options.open,
        ssr_mode=False,
        app_kwargs={"middleware": [Middleware(SameHostOnly)]},
        **more,
    )

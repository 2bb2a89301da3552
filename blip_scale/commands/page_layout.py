"""Build the demo page with gradio, and serve it. Import this only if gradio is installed."""

from __future__ import annotations

import argparse
import html
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import gradio as gr
from gradio.components import Component
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
.about table, .about tr { border: none !important; }
.about table { border-collapse: collapse; margin: .6em 0; font-size: .92em; }
.about td, .about th { padding: .25em .8em; text-align: right; border: none !important;
  border-bottom: 1px solid var(--border-color-primary) !important; }
.about td:first-child, .about th:first-child { text-align: left; padding-left: 0;
  white-space: nowrap; }
@media (max-width: 600px) {
  .about td:first-child { white-space: normal; }
  .about th { overflow-wrap: anywhere; min-width: 5.5em; }
  #results .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; }
  #results .caption-label, #examples .caption-label { font-size: .75em; padding: .1em .4em; }
}
#examples .grid-wrap, #results .grid-wrap { height: auto; min-height: 0; max-height: none; }
#examples { min-height: 0; }
#heat { border: none !important; }
.note { color: var(--body-text-color-subdued); font-size: .9em; line-height: 1.45;
  padding: .2em .3em; }
"""
_MATCH_NOTE = (
    "match is how sure the model is that a text describes the image: 1 is yes, 0 is no, 0.5 is "
    "undecided. cosine compares image and text as two vectors, from -1 to 1; it orders a search "
    "and has no threshold."
)
_WORDS_NOTE = (
    "Red places raise the matching score through a word (Grad-CAM of the cross-attention). Each "
    "map is scaled to its own greatest value. No colour: the word raises nothing."
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
"""Use of a checkpoint -> description of the matching function of the page."""

Ask = Callable[..., Any]


def build(service: Service) -> gr.Blocks:
    """Build the page for a service."""
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
                _note(_missing(service))
        if service.able("embed"):
            with gr.Tab("Search"):
                _search_panel(service)
    return page


def _note(text: str) -> None:
    """Add a line in small type, unless the text is empty."""
    if text:
        gr.HTML(f'<div class="note">{text}</div>', padding=False)


def _missing(service: Service) -> str:
    """Name the uses that no checkpoint serves, in one sentence; "" if every use is served."""
    missing = [words for use, words in _USES.items() if not service.able(use)]
    if not missing:
        return ""
    return f"To {' or to '.join(missing)}, start the page with a checkpoint that can."


def _visible(shown: bool, **changes: Any) -> Any:
    """Return an update that shows or hides a component.

    The component is hidden by its style. With visible=False, gradio 6.10 removes it from the page
    and does not restore it inside a group.
    """
    return gr.update(visible=True if shown else "hidden", **changes)


def _kindly(ask: Ask, *inputs: Any) -> Any:
    """Call `ask`. If it refuses the input, show a warning and leave the page unchanged."""
    try:
        return ask(*inputs)
    except (ValueError, CorruptSample) as error:
        gr.Warning(html.escape(_sentence(error)))
        return gr.skip()


def _strictly(ask: Ask, *inputs: Any) -> Any:
    """Call `ask`. If it refuses the input, raise an error for the caller of the API."""
    try:
        return ask(*inputs)
    except (ValueError, CorruptSample) as error:
        raise gr.Error(_sentence(error), print_exception=False) from error


def _sentence(error: Exception) -> str:
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}."


def _endpoint(name: str, ask: Ask, inputs: list[Component], output: Component) -> None:
    """Add an endpoint to gradio's API. No button of the page calls it."""
    unseen = gr.Button(visible=False)
    unseen.click(partial(_strictly, ask), inputs, output, api_name=name)


def _examples(image: gr.Image, service: Service) -> Dependency | None:
    """Show example images that the user can select.

    Return the event of copying the selected image to the page's image. Without images, show a
    hint and return None.
    """
    if not service.images:
        _note(_NO_IMAGES)
        return None
    examples = service.examples()
    _note("Or click one of these images:")
    gallery = gr.Gallery(
        examples, show_label=False, columns=3, height="auto", object_fit="contain",
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
        with gr.Row():
            method = gr.Radio([BEAM, NUCLEUS], value=BEAM, show_label=False, scale=2)
            beams = gr.Number(3, label="beams", precision=0, minimum=1, maximum=10, min_width=80)
            seed = gr.Number(
                0, label="seed", precision=0, minimum=0, min_width=80, visible="hidden"
            )
        button = gr.Button("Caption", variant="primary")

    def shown(chosen: str) -> tuple[Any, Any]:
        return _visible(chosen == BEAM), _visible(chosen == NUCLEUS)

    ask = partial(_kindly, service.caption)
    inputs: list[Component] = [image, method, beams, seed]
    method.change(shown, method, [beams, seed], api_visibility="private")
    _endpoint("caption", service.caption, inputs, caption)
    button.click(ask, inputs, caption, api_visibility="private")
    image.upload(ask, inputs, caption, api_visibility="private")
    image.clear(lambda: "", None, caption, api_visibility="private")
    if chosen is not None:
        chosen.then(ask, inputs, caption, api_visibility="private")
    return caption


def _words_panel(image: gr.Image, caption: gr.Textbox | gr.State, service: Service) -> None:
    with gr.Group():
        text = gr.Textbox(
            label="Where are the words?",
            info=_WORDS_NOTE,
            max_lines=2,
            placeholder="the caption above" if service.able("caption") else "a dog in the snow",
        )
        maps = gr.State()
        heat = gr.Image(
            label="Heat map", interactive=False, visible="hidden", format="png", buttons=[],
            height=300, elem_id="heat",
        )  # fmt: skip
        words = gr.Radio([], label="Word", visible="hidden", elem_id="words")
        button = gr.Button("Show the words")

    def explain(path: str | None, typed: str, written: str) -> tuple[Any, Any, Any]:
        results = service.explain(path, typed if typed.strip() else written)
        choices = [(word, str(index)) for index, (word, _) in enumerate(results)]
        pictures = [picture for _, picture in results]
        radio = _visible(True, choices=choices, value="0")
        return pictures, radio, _visible(True, value=pictures[0])

    def chosen_word(pictures: list[Image.Image], index: str) -> Image.Image:
        return pictures[int(index)]

    def cleared() -> tuple[Any, Any, Any]:
        return None, _visible(False, choices=[], value=None), _visible(False, value=None)

    for event in (button.click, text.submit):
        event(
            partial(_kindly, explain), [image, text, caption], [maps, words, heat],
            api_visibility="private",
        )  # fmt: skip
    words.input(chosen_word, [maps, words], heat, api_visibility="private", show_progress="hidden")
    image.change(cleared, None, [maps, words, heat], api_visibility="private")


def _match_panel(image: gr.Image, service: Service) -> None:
    with gr.Group():
        texts = gr.Textbox(
            label="Texts, one a line", info=_MATCH_NOTE, placeholder="a dog\na cat", lines=3
        )
        button = gr.Button("Match")
        rows = gr.Dataframe(
            headers=["text", "match", "cosine"], interactive=False, show_label=False,
            column_widths=["50%", "25%", "25%"], row_count=1, wrap=True,
        )  # fmt: skip
    _endpoint("match", service.match, [image, texts], rows)
    button.click(partial(_kindly, service.match), [image, texts], rows, api_visibility="private")
    image.change(lambda: [], None, rows, api_visibility="private")


def _question_panel(image: gr.Image, service: Service) -> None:
    with gr.Group():
        question = gr.Textbox(label="Question", placeholder="what is the dog doing?")
        answer = gr.Textbox(label="Answer", interactive=False)
        button = gr.Button("Ask")
    image.change(lambda: "", None, answer, api_visibility="private")
    _endpoint("answer", service.answer, [image, question], answer)
    for event in (button.click, question.submit):
        event(partial(_kindly, service.answer), [image, question], answer, api_visibility="private")


def _search_panel(service: Service) -> None:
    number = len(service.images)
    if not number:
        _note(_NO_IMAGES)
    with gr.Row(equal_height=True):
        text = gr.Textbox(
            show_label=False, placeholder=f"Search {number} images", scale=6, min_width=200
        )
        button = gr.Button("Search", variant="primary", min_width=100)
    rerank = gr.Checkbox(label="re-rank the best by matching", container=False)
    results = gr.Gallery(
        service.thumbnails(), columns=4, height="auto", object_fit="contain", show_label=False,
        buttons=[], interactive=False, elem_id="results",
    )  # fmt: skip
    _endpoint("search", service.search, [text, rerank], results)
    for event in (button.click, text.submit):
        event(partial(_kindly, service.search), [text, rerank], results, api_visibility="private")


def about(service: Service) -> str:
    """Describe each checkpoint and its training, as HTML. Text from checkpoints is escaped."""
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
    """Return an HTML table with one column for each held-out set."""
    columns: dict[str, dict[str, float]] = {}
    for key, value in record.figures.items():
        name, _, figure = key.rpartition("/")
        if figure.endswith("_r5"):  # R@1 and R@10 are enough; the table must fit on a phone
            continue
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
    """Return a readable name of a figure.

    For example, `itc_image_to_text_r1` becomes "image to text R@1 (cosine)".
    """
    kind, _, rest = figure.partition("_")
    ways = {"itc": " (cosine)", "itm": " (re-ranked)"}
    if kind not in ways:
        return figure.replace("_", " ")
    direction, _, recall = rest.rpartition("_r")
    return f"{direction.replace('_', ' ')} R@{recall}{ways[kind]}"


def _number(figure: str, value: float) -> str:
    is_recall = figure.rpartition("_r")[2].isdecimal()
    return f"{100 * value:.1f} %" if is_recall else f"{value:,.4g}"


def launch(page: gr.Blocks, options: argparse.Namespace, **more: Any) -> None:
    """Serve the page; `more` is passed to gradio's `launch`."""
    fonts = ["system-ui", "sans-serif"]  # gradio's default fonts are loaded from another host
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

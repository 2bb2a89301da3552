"""A page to try checkpoints on: drop an image, get a caption, ask about it, match texts, search a
folder of images by text.

python tools/demo.py runs/demo --images photos/
python tools/demo.py runs/captioner runs/filter runs/vqa
Every checkpoint serves what it can: one of pretraining captions, matches and searches. The page is
served on this machine alone, unless --host says otherwise. It needs gradio:
pip install --no-deps -r requirements-web.txt
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from blip_scale.commands.command_line import Parser, refuse, report_error
from blip_scale.data.pixels.decoding import decode_image
from blip_scale.data.reading.stream_store import CorruptSample
from blip_scale.inference import predictions
from blip_scale.inference.blip import Blip, Use
from blip_scale.inference.images import find_images
from blip_scale.inference.loading import Loading, load_blip
from blip_scale.inference.predictions import Reader
from blip_scale.model.generation import BeamSettings, NucleusSettings
from blip_scale.storage.locations import read_file

if TYPE_CHECKING:
    import gradio as gr

BEAM, NUCLEUS = "beam search", "nucleus sampling"
_SHOWN = 12
_SHOWN_SIDE = 800
_MOST_UPLOADED = "20mb"
_RERANKED = 32
_STYLE = """
.gradio-container { width: 100% !important; max-width: 1120px !important;
  margin: 0 auto !important; }
footer { display: none !important; }
"""


def main(arguments: Sequence[str] | None = None, prog: str = "demo.py") -> int:
    """Returns the exit code: 0, or 2 where nothing can be served."""
    options = parser(prog).parse_args(arguments)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        # Uploads lie in a folder of this process alone: gradio's own is /tmp/gradio for all users.
        with tempfile.TemporaryDirectory(prefix="blip_scale_page_") as folder:
            os.environ["GRADIO_TEMP_DIR"] = folder
            launch(build(service(options)), options)
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        fix = "`pip install gradio`, or in a clone `pip install --no-deps -r requirements-web.txt`"
        return refuse(prog, f"the page needs gradio; run {fix}")
    except (OSError, ValueError) as error:
        return report_error(prog, error)
    return 0


@dataclass
class Service:
    """What the page asks; raises ValueError with a line for the user."""

    blips: list[Blip]
    images: list[str]
    """To search in."""
    features: dict[str, list[float]] = field(default_factory=dict)
    """Of `images`, computed at the first search."""

    def able(self, use: Use) -> Blip | None:
        """The first checkpoint that serves a use."""
        return next((blip for blip in self.blips if blip.serves(use)), None)

    def blip_for(self, use: Use) -> Blip:
        blip = self.able(use)
        if blip is None:
            raise ValueError(f"none of the checkpoints can {use}; start the page with one that can")
        return blip

    def caption(self, image: str | None, method: str, beams: int, seed: int) -> str:
        """A caption of an image file."""
        blip = self.blip_for("caption")
        output = blip.output
        decoding: BeamSettings | NucleusSettings = replace(output.beam(), num_beams=int(beams))
        if method == NUCLEUS:
            decoding = NucleusSettings(max_length=output.max_length, min_length=output.min_length)
        settings = predictions.CaptionSettings(decoding, seed=int(seed))
        return self._only(predictions.captions(Reader(blip), [_given(image)], settings))["caption"]

    def answer(self, image: str | None, question: str) -> str:
        """The answer to a question about an image file."""
        blip = self.blip_for("vqa")
        if not question.strip():
            raise ValueError("type a question first")
        return self._only(predictions.replies(Reader(blip), [_given(image)], [question]))["answer"]

    def match(self, image: str | None, texts: str) -> list[list[Any]]:
        """Rows of text, matching probability and cosine, best first; `texts`: one a line."""
        blip = self.blip_for("match")
        wanted = [line.strip() for line in texts.splitlines() if line.strip()]
        if not wanted:
            raise ValueError("type a text first; several go on lines of their own")
        found = list(predictions.matches(Reader(blip), [_given(image)], wanted))
        if "error" in found[0]:
            raise ValueError(f"this image can't be decoded: {found[0]['error']}")
        found.sort(key=lambda one: -one["itm"])
        return [[one["text"], f"{one['itm']:.3f}", f"{one['itc']:.3f}"] for one in found]

    def search(self, text: str, rerank: bool) -> list[tuple[Image.Image, str]]:
        """The best images of a text, scaled down, each with its score and name.

        Pixels leave, not files: whatever else lies among the images is never served.
        """
        reader = Reader(self.blip_for("embed"))
        if not self.images:
            raise ValueError("there are no images to search; start the page with --images FOLDER")
        if not text.strip():
            raise ValueError("type a text first")
        found = predictions.search(
            reader, self.images, text, _SHOWN, _RERANKED if rerank else 0, self.features
        )
        return [(_small(one["image"]), _scores(one)) for one in found if "error" not in one]

    @staticmethod
    def _only(found: Any) -> dict[str, Any]:
        one = next(iter(found))
        if "error" in one:
            raise ValueError(f"this image can't be decoded: {one['error']}")
        return one


def _given(image: str | None) -> str:
    if image is None:
        raise ValueError("drop an image first")
    return image


def _small(path: str) -> Image.Image:
    image = decode_image(read_file(path), upright=True)
    image.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    return image


def _scores(one: dict[str, Any]) -> str:
    by = f"match {one['itm']:.2f}" if "itm" in one else f"cosine {one['itc']:.2f}"
    return f"{by} · {Path(one['image']).stem}"


def service(options: argparse.Namespace) -> Service:
    """The checkpoints loaded, the images found."""
    import gradio  # noqa: F401  before anything is loaded

    loading = Loading(tokenizer=options.tokenizer, recipe=options.recipe, device=options.device)
    images = find_images([options.images]) if options.images else []
    return Service([load_blip(path, loading) for path in options.models], images)


def build(service: Service) -> gr.Blocks:
    """The page; what no checkpoint can do says so when it is asked."""
    import gradio as gr

    def told(ask: Any, *given: Any) -> Any:
        """What `ask` gives; what it refuses appears on the page."""
        try:
            return ask(*given)
        except (ValueError, CorruptSample) as error:
            raise gr.Error(str(error), title="Not yet", print_exception=False) from error

    with gr.Blocks(title="BLIP") as page:
        gr.Markdown("# BLIP\n" + _about(service))
        with gr.Tab("One image"), gr.Row(equal_height=False):
            image = gr.Image(
                type="filepath", image_mode=None, label="Image", height=380, sources=["upload"]
            )
            with gr.Column():
                _caption_panel(image, partial(told, service.caption))
                _question_panel(image, partial(told, service.answer), service)
                _match_panel(image, partial(told, service.match))
        with gr.Tab("Search"):
            _search_panel(partial(told, service.search), service)
    return page


def _caption_panel(image: gr.Image, ask: Any) -> None:
    import gradio as gr

    with gr.Group():
        said = gr.Textbox(label="Caption", interactive=False, lines=2)
        with gr.Row():
            method = gr.Radio([BEAM, NUCLEUS], value=BEAM, show_label=False, scale=2)
            beams = gr.Number(3, label="beams", precision=0, minimum=1, maximum=10, min_width=80)
            seed = gr.Number(0, label="seed", precision=0, minimum=0, min_width=80, visible=False)
        button = gr.Button("Caption", variant="primary")

    def shown(chosen: str) -> tuple[Any, Any]:
        return gr.update(visible=chosen == BEAM), gr.update(visible=chosen == NUCLEUS)

    method.change(shown, method, [beams, seed], api_visibility="private")
    given = [image, method, beams, seed]
    button.click(ask, given, said, api_name="caption")
    image.upload(ask, given, said, api_visibility="private")


def _question_panel(image: gr.Image, ask: Any, service: Service) -> None:
    import gradio as gr

    able = service.able("vqa") is not None
    hint = "what is the dog doing?" if able else "needs a checkpoint fine-tuned for vqa"
    with gr.Group():
        question = gr.Textbox(label="Question", placeholder=hint, interactive=able)
        said = gr.Textbox(label="Answer", interactive=False)
        button = gr.Button("Ask", interactive=able)
    for event in (button.click, question.submit):
        visible = "public" if event == button.click else "private"
        event(ask, [image, question], said, api_name="answer", api_visibility=visible)


def _match_panel(image: gr.Image, ask: Any) -> None:
    import gradio as gr

    with gr.Group():
        texts = gr.Textbox(label="Texts, one a line", placeholder="a dog\na cat", lines=3)
        button = gr.Button("Match")
        found = gr.Dataframe(
            headers=["text", "match", "cosine"], interactive=False, show_label=False,
            column_widths=["60%", "20%", "20%"], row_count=1,
        )  # fmt: skip
    button.click(ask, [image, texts], found, api_name="match")


def _search_panel(ask: Any, service: Service) -> None:
    import gradio as gr

    number = len(service.images)
    with gr.Row(equal_height=True):
        hint = f"Search {number} images by text"
        text = gr.Textbox(show_label=False, placeholder=hint, scale=6, min_width=300)
        rerank = gr.Checkbox(label="re-rank by matching", min_width=210)
        button = gr.Button("Search", variant="primary", min_width=120)
    found = gr.Gallery(columns=4, height=800, object_fit="contain", show_label=False)
    given = [text, rerank]
    button.click(ask, given, found, api_name="search")
    text.submit(ask, given, found, api_visibility="private")


def _about(service: Service) -> str:
    lines = [
        f"`{blip.origin}`: {blip.head}, {blip.image_size} pixels, on {blip.device.type}"
        for blip in service.blips
    ]
    return "  \n".join(lines)


def launch(page: gr.Blocks, options: argparse.Namespace, **more: Any) -> None:
    """Serve the page; `more` is for gradio."""
    import gradio as gr

    fonts = ["system-ui", "sans-serif"]  # gradio's own are fetched from the internet
    page.launch(
        server_name=options.host,
        server_port=options.port,
        theme=gr.themes.Soft(font=fonts, font_mono=["ui-monospace", "monospace"]),
        css=_STYLE,
        footer_links=[],
        show_error=True,
        max_file_size=_MOST_UPLOADED,
        inbrowser=options.open,
        **more,
    )


def parser(prog: str = "demo.py") -> Parser:
    """Of the command line."""
    parser = Parser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models", nargs="+", type=Path, metavar="CHECKPOINT",
        help="a run's folder, step_N, BLIP's .pth, or a Hugging Face folder",
    )  # fmt: skip
    parser.add_argument("--images", metavar="FOLDER", help="to search by text")
    parser.add_argument("--recipe", help="network's sizes, where the checkpoints don't say them")
    parser.add_argument("--tokenizer", help="default: the recipe's, or the one beside the model")
    parser.add_argument("--device", help="default: cuda if there is a GPU, else cpu")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves others (%(default)s)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--open", action="store_true", help="open the browser")
    return parser

"""Zero-shot classification: against the definition, and against clip_benchmark's own command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
import torch.nn.functional as F

from blip_scale.commands import clip_benchmark, evaluate
from blip_scale.data.shards import Record, write_shards
from blip_scale.evaluation.classification import classification_figures
from blip_scale.inference.images import pixels_of
from blip_scale.inference.loading import load_blip

TEMPLATES = ["a big {}", "a small {} on grey", "a {}."]
NAMES = {name: f"{name} disc and square" for name in tiny_runs.COLOURS}


def colour_of(record: Record) -> str:
    return next(name for name in tiny_runs.COLOURS if name in record.captions[0])


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """val/ with a folder for each colour, shards/ with the colour as caption, names, templates."""
    place = tmp_path_factory.mktemp("labelled")
    records = []
    for record in tiny_runs.records("c")[:-5]:  # classes differ in size
        label = colour_of(record)
        (place / "val" / label).mkdir(parents=True, exist_ok=True)
        (place / "val" / label / f"{record.id}.png").write_bytes(record.image)
        records.append(Record(record.id, record.image, label, "drawings"))
    write_shards(place / "shards", records)
    (place / "names.json").write_text(json.dumps(NAMES))
    (place / "list.txt").write_text("\n".join(NAMES[label] for label in sorted(NAMES)) + "\n")
    (place / "templates.txt").write_text("\n".join(TEMPLATES) + "\n\n")
    return place


def measured(*arguments: Any, out: Path) -> dict[str, Any]:
    """Figures of the command."""
    words = ["classification", *map(str, arguments), "--json", str(out), "--overwrite"]
    assert evaluate.main(words) == 0
    return json.loads(out.read_text())["figures"]


def test_figures_are_those_of_the_definition(ours: Path, labelled: Path, tmp_path: Path) -> None:
    """Mean of normalised prompts, normalised again; folders, lists and shards agree."""
    options = ["--templates", labelled / "templates.txt", "--class-names"]
    out = tmp_path / "figures.json"
    figures = measured(ours, labelled / "val", *options, labelled / "names.json", out=out)
    assert figures == measured(ours, labelled / "shards", *options, labelled / "list.txt", out=out)

    blip = load_blip(ours)
    labels = sorted(NAMES)
    rows = []
    for label in labels:
        prompts = [template.format(NAMES[label]) for template in TEMPLATES]
        rows.append(F.normalize(blip.text_features(prompts).mean(dim=0), dim=0))
    files = sorted((labelled / "val").rglob("*.png"))
    pixels = torch.stack([pixels_of(file.read_bytes(), blip.image_size) for file in files])
    scores = blip.image_features(blip.image_embeds(pixels)) @ torch.stack(rows).T
    right = torch.tensor([labels.index(file.parent.name) for file in files])
    ranked = scores.argsort(dim=1, descending=True)
    hits = ranked == right[:, None]
    assert figures["top1"] == pytest.approx(hits[:, 0].double().mean().item())
    assert figures["top5"] == pytest.approx(hits[:, :5].any(dim=1).double().mean().item())
    of_classes = [hits[right == number, 0].double().mean() for number in range(len(labels))]
    assert figures["mean_per_class"] == pytest.approx(torch.stack(of_classes).mean().item())
    assert 0 < figures["top1"] < figures["top5"] < 1
    assert figures["top1"] != figures["mean_per_class"]
    assert (figures["classes"], figures["templates"]) == (8, 3)


def test_ties_and_nan_count_against_the_right_class() -> None:
    labels = torch.tensor([0, 1, 1])
    scores = torch.tensor([[0.5, 0.5, 0.1], [0.1, 0.3, 0.2], [0.0, float("nan"), 0.0]])
    figures = classification_figures(scores, labels)
    assert figures == {"top1": 1 / 3, "top5": 1.0, "mean_per_class": 0.25}
    assert classification_figures(torch.zeros(3, 9), labels)["top5"] == 0.0


def test_what_does_not_fit_is_refused(
    ours: Path, hf: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: Any) -> str:
        assert evaluate.main(["classification", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    val, file = labelled / "val", tmp_path / "file.json"
    file.write_text(json.dumps({"red": "red"}))
    assert "7 labels of the images have no name, the first: black" in refused(
        ours, val, "--class-names", file
    )
    file.write_text(json.dumps(["red"]))
    assert "1 names, but the images have 8 labels" in refused(ours, val, "--class-names", file)
    file.write_text(json.dumps(["a photo"]))
    assert "'a photo' lacks {}, the place of the class" in refused(ours, val, "--templates", file)
    for odd in ([1, 2], [""] * 8, [["a"]] * 8):
        file.write_text(json.dumps((odd * 8)[:8]))
        assert "expected non-empty strings" in refused(ours, val, "--class-names", file)
    missing = tmp_path / "missing" / "figures.json"
    assert "figures.json: expected a file in a folder" in refused(ours, val, "--json", missing)
    file.write_text("{")
    assert "file.json is not JSON" in refused(ours, val, "--templates", file)
    assert "images are not in a class folder" in refused(ours, val / "red")
    assert "there is no image" in refused(ours, tmp_path)
    assert "embed takes one of" in refused(hf / "captioning", val)


def test_clip_benchmark_measures_the_same(ours: Path, labelled: Path, tmp_path: Path) -> None:
    """Its own command on the same folder, names and templates."""
    for package in ("clip_benchmark", "requests"):
        pytest.importorskip(package, reason="optional: pip install clip-benchmark requests")
    dataset = "imagenet1k-unverified"  # torchvision's ImageFolder of root/val
    names, templates = tmp_path / "names.json", tmp_path / "templates.json"
    names.write_text(json.dumps({dataset: [NAMES[label] for label in sorted(NAMES)]}))
    with_key = [template.replace("{}", "{c}") for template in TEMPLATES]
    templates.write_text(json.dumps({dataset: with_key}))
    out = tmp_path / "out.json"
    arguments = [
        *("eval", "--pretrained", str(ours), "--model", "tiny", "--dataset", dataset),
        *("--dataset_root", str(labelled), "--output", str(out), "--num_workers", "0"),
        *("--custom_classname_file", str(names), "--custom_template_file", str(templates)),
        *("--no_amp", "--quiet", "--batch_size", "7"),
    ]
    assert clip_benchmark.main(arguments) == 0
    result = json.loads(out.read_text())
    options = ["--class-names", labelled / "list.txt", "--templates", labelled / "templates.txt"]
    figures = measured(ours, labelled / "val", *options, out=tmp_path / "figures.json")
    assert result["metrics"]["acc1"] == pytest.approx(figures["top1"])
    assert result["metrics"]["acc5"] == pytest.approx(figures["top5"])
    assert result["metrics"]["mean_per_class_recall"] == pytest.approx(figures["mean_per_class"])

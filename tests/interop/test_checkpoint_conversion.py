"""Conversions between formats and back keep every bit, and leave nothing incomplete."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_blip
import torch
import xxhash
from safetensors.torch import load_file, save_file
from tiny_blip import Convert
from torch import Tensor

from blip_scale.interop.blip_weights import turned_into
from blip_scale.interop.checkpoints import read_checkpoint
from blip_scale.interop.heads import expected_shapes
from blip_scale.interop.salesforce import from_salesforce
from blip_scale.interop.salesforce_files import read_salesforce, write_salesforce
from blip_scale.model.med import MED, MEDConfig
from blip_scale.model.text import SpecialTokens, TextConfig
from blip_scale.model.vision import VisionConfig
from blip_scale.storage.checkpoint_format import Manifest


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors in the files of a training checkpoint."""
    return load_file(folder / "rank_00000.safetensors") | load_file(folder / "shared.safetensors")


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() and len(actual) > 20
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


def test_round_trip_keeps_every_bit(ours: Path, tmp_path: Path, convert: Convert) -> None:
    """Convert ours -> Hugging Face -> ours -> Salesforce -> ours.

    Momentum copies and queues survive where the format has them.
    """
    expected = tensors(ours)
    weights = {name: tensor for name, tensor in expected.items() if name.startswith("weight/")}
    hf = convert(ours, tmp_path / "hf", "--head", "all")
    assert sorted(path.name for path in hf.iterdir()) == ["captioning", "retrieval", "vqa"]
    back = convert(hf, tmp_path / "back", "--to", "ours")
    assert_equal(load_file(back / "rank_00000.safetensors"), weights)
    assert (back / "tokenizer" / "tokenizer_config.json").is_file()
    pth = convert(back, tmp_path / "back.pth")
    again = convert(pth, tmp_path / "again", "--to", "ours")
    converted = load_file(again / "rank_00000.safetensors")
    assert_equal({name: converted[name] for name in weights}, weights)

    pth = convert(ours, tmp_path / "whole.pth")
    whole = convert(pth, tmp_path / "whole", "--to", "ours", "--tokenizer", str(ours / "tokenizer"))
    expected["queue/entered_at"] = torch.full((tiny_blip.QUEUE,), -1)
    assert_equal(tensors(whole), expected)
    assert read_checkpoint(whole).config == read_checkpoint(ours).config
    for folder in (back, whole):
        assert read_checkpoint(folder).step == tiny_blip.STEP


def test_every_head_comes_out_of_a_pretraining(
    ours: Path, tmp_path: Path, convert: Convert, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Salesforce file and a Hugging Face folder of one checkpoint hold the same tensors."""
    for head in ("captioning", "vqa", "retrieval"):
        pth = read_salesforce(convert(ours, tmp_path / f"{head}.pth", "--head", head))
        folder = read_checkpoint(convert(ours, tmp_path / head, "--head", head))
        assert pth.head == folder.head == head
        assert folder.state.keys() <= pth.state.keys()
        for name, tensor in folder.state.items():
            assert torch.equal(tensor, pth.state[name]), name
        extra = {name.partition(".")[0] for name in pth.state.keys() - folder.state.keys()}
        if head != "retrieval":
            assert extra == set()
            continue
        momentum = {f"{part}_m" for part in
                    ("visual_encoder", "text_encoder", "vision_proj", "text_proj")}  # fmt: skip
        assert extra == {*momentum, "image_queue", "text_queue", "idx_queue", "ptr_queue"}
        assert pth.state["idx_queue"].tolist() == [[-100] * tiny_blip.QUEUE]
        assert pth.state["ptr_queue"].tolist() == [0]
    assert "note: idx_queue is -100 and ptr_queue 0" in capsys.readouterr().out


def test_what_hugging_face_lacks_is_made_as_published(
    ours: Path, tmp_path: Path, convert: Convert, capsys: pytest.CaptureFixture[str]
) -> None:
    """Momentum copies are copies, queues are random unit columns, and a note says so."""
    folder = convert(ours, tmp_path / "hf", "--head", "retrieval")
    state = read_salesforce(convert(folder, tmp_path / "retrieval.pth")).state
    assert (
        "it has no momentum copies and queues: set to copies of the weights"
        in capsys.readouterr().out
    )
    assert state["temp"].item() == pytest.approx(0.0519)
    for name, tensor in state.items():
        if name.startswith(("visual_encoder.", "text_encoder.", "vision_proj.", "text_proj.")):
            part, _, rest = name.partition(".")
            assert torch.equal(state[f"{part}_m.{rest}"], tensor), name
    for kind in ("image_queue", "text_queue"):
        assert state[kind].shape == (16, 57600)
        torch.testing.assert_close(state[kind].norm(dim=0), torch.ones(57600))


def test_a_fine_tuned_half_stays_one(ours: Path, tmp_path: Path, convert: Convert) -> None:
    """A captioning model that was fine-tuned alone, or two unequal halves, make no MED."""
    hf = convert(ours, tmp_path / "hf", "--head", "all")
    captioning = read_checkpoint(hf / "captioning")
    with pytest.raises(
        ValueError, match=r"\(captioning\) can't become pretrain: it has no text_en"
    ):
        turned_into(captioning, "pretrain")
    with pytest.raises(ValueError, match=r"its decoder reads the states of questions"):
        turned_into(read_checkpoint(hf / "vqa"), "captioning")
    weights = load_file(hf / "captioning" / "model.safetensors")
    name = "vision_model.encoder.layers.1.mlp.fc2.bias"
    weights[name][3] += 1e-6
    save_file(weights, hf / "captioning" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc2\.bias differs between captioning"):
        read_checkpoint(hf)


def test_encoder_and_decoder_that_were_trained_apart(ours: Path, tmp_path: Path) -> None:
    weights = read_checkpoint(ours)
    name = "text_decoder.bert.encoder.layer.1.crossattention.self.key.bias"
    weights.state[name] = weights.state[name] + 1
    write_salesforce(weights, tmp_path / "apart.pth")
    apart = read_checkpoint(tmp_path / "apart.pth")
    with torch.device("meta"):
        names = [name for name, _ in MED(apart.config).named_parameters()]
    with pytest.raises(
        ValueError, match=r"layer\.1\.crossattention\.self\.key\.bias and .* differ"
    ):
        from_salesforce(apart.state, names)


def base(vision: VisionConfig) -> MEDConfig:
    special = SpecialTokens(pad=0, cls=101, sep=102, enc=30523, dec=30522)
    return MEDConfig(vision, TextConfig(special))


def published(head: str, width: int = 768, blocks: int = 12, queue: int = 57600) -> dict:
    """Published names and shapes, written out by hand."""
    vit: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width), "pos_embed": (1, 197, width),
        "patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,),
        "norm.weight": (width,), "norm.bias": (width,),
    }  # fmt: skip
    for i in range(blocks):
        for name, shape in {
            "norm1": (width,), "norm2": (width,), "attn.qkv": (3 * width, width),
            "attn.proj": (width, width), "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width),
        }.items():  # fmt: skip
            vit |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}

    def bert(cross: int) -> dict[str, tuple[int, ...]]:
        names: dict[str, tuple[int, ...]] = {
            "embeddings.position_ids": (1, 512),
            "embeddings.word_embeddings.weight": (30524, 768),
            "embeddings.position_embeddings.weight": (512, 768),
            "embeddings.LayerNorm.weight": (768,), "embeddings.LayerNorm.bias": (768,),
        }  # fmt: skip
        for layer in range(12):
            linear = {
                "attention.self.query": 768, "attention.self.key": 768,
                "attention.self.value": 768, "attention.output.dense": 768,
                "crossattention.self.query": 768, "crossattention.self.key": cross,
                "crossattention.self.value": cross, "crossattention.output.dense": 768,
            }  # fmt: skip
            matrices = {name: (768, inputs) for name, inputs in linear.items()}
            matrices |= {"intermediate.dense": (3072, 768), "output.dense": (768, 3072)}
            norms = ("attention.output", "crossattention.output", "output")
            whole: dict[str, tuple[int, ...]] = {
                **matrices, **{f"{norm}.LayerNorm": (768,) for norm in norms},
            }  # fmt: skip
            for name, shape in whole.items():
                at = f"encoder.layer.{layer}.{name}"
                names |= {f"{at}.weight": shape, f"{at}.bias": shape[:1]}
        return names

    def under(prefix: str, names: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        return {f"{prefix}.{name}": shape for name, shape in names.items()}

    visual, encoder = under("visual_encoder", vit), under("text_encoder", bert(width))
    decoder = under("text_decoder.bert", bert(768 if head == "vqa" else width))
    cls = "text_decoder.cls.predictions"
    decoder |= {
        f"{cls}.bias": (30524,), f"{cls}.transform.dense.weight": (768, 768),
        f"{cls}.transform.dense.bias": (768,), f"{cls}.transform.LayerNorm.weight": (768,),
        f"{cls}.transform.LayerNorm.bias": (768,), f"{cls}.decoder.weight": (30524, 768),
        f"{cls}.decoder.bias": (30524,),
    }  # fmt: skip
    heads = {
        "vision_proj.weight": (256, width), "vision_proj.bias": (256,),
        "text_proj.weight": (256, 768), "text_proj.bias": (256,),
    }  # fmt: skip
    towers = visual | encoder | heads
    copies = {name.replace(".", "_m.", 1): shape for name, shape in towers.items()}
    top = {"itm_head.weight": (2, 768), "itm_head.bias": (2,), "temp": ()}
    queues = {"image_queue": (256, queue), "text_queue": (256, queue)}
    both = towers | copies | top | queues
    return {
        "pretrain": both | decoder | {"queue_ptr": (1,)},
        "retrieval": both | {"idx_queue": (1, queue), "ptr_queue": (1,)},
        "captioning": visual | decoder,
        "vqa": visual | encoder | decoder,
    }[head]


@pytest.mark.parametrize("head", ["pretrain", "retrieval", "captioning", "vqa"])
@pytest.mark.parametrize(("name", "width", "blocks"), [
    ("vit_base_patch16_224", 768, 12), ("vit_large_patch16_224", 1024, 24),
])  # fmt: skip
def test_the_layouts_are_the_published_ones(head, name: str, width: int, blocks: int) -> None:
    """Every name and shape of both published sizes is expected."""
    queue = 57600 if head in ("pretrain", "retrieval") else None
    shapes = expected_shapes(head, base(VisionConfig(name)), queue)
    assert {key: tuple(shape) for key, shape in shapes.items()} == published(head, width, blocks)


def test_nlvr2_has_twin_cross_attentions() -> None:
    layout = expected_shapes("nlvr2", base(VisionConfig()), None)
    layer = "text_encoder.encoder.layer.{}.crossattention.{}"
    for number in (0, 1):
        for name in ("self{}.query", "self{}.key", "self{}.value", "output.dense{}"):
            assert layout[layer.format(3, name.format(number)) + ".weight"] == (768, 768)
    assert layer.format(3, "self.query") + ".weight" not in layout
    merges = [name for name in layout if name.endswith("merge_layer.weight")]
    assert merges == [layer.format(i, "output.merge_layer.weight") for i in range(6, 12)]
    assert layout[merges[0]] == (768, 1536)
    assert layout["cls_head.0.weight"] == (768, 768) and layout["cls_head.2.weight"] == (2, 768)


def test_published_files_without_sizes(tmp_path: Path) -> None:
    """The number of heads follows from the width, as published."""
    sizes = base(VisionConfig("vit_base_patch16_224", 32, {"depth": 1}))
    shapes = expected_shapes("captioning", sizes, None)
    shapes = {n: s for n, s in shapes.items() if ".layer." not in n or ".layer.0." in n}
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    torch.save({"model": state, "epoch": 3, "config": {"vit": "base"}}, tmp_path / "caption.pth")
    config = read_salesforce(tmp_path / "caption.pth").config
    assert (config.text.heads, config.text.layers, config.vision.image_size) == (12, 1, 32)
    assert config.vision.overrides["num_heads"] == 12 and config.vision.overrides["depth"] == 1
    assert config.text.special == sizes.text.special


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    added = ("format_version", "checksum")
    fields = {name: value for name, value in content.items() if name not in added}
    (folder / "manifest.json").write_text(Manifest(**fields).to_json())


def test_pieces_of_ranks_are_put_together(ours: Path, tmp_path: Path) -> None:
    """The files of three ranks hold slices of any length, as under ZeRO-2 and ZeRO-3."""
    folder = tmp_path / "step_00000007"
    shutil.copytree(ours, folder)
    source = folder / "rank_00000.safetensors"
    whole = load_file(source)
    source.unlink()
    names = sorted({name.partition("/med.")[2] for name in whole})
    for rank in range(3):
        pieces, starts = {}, {}
        for number, name in enumerate(names):
            size = len(whole[f"weight/med.{name}"])
            cuts = [0, size // (2 + number % 4), size - size // 5, size]
            if cuts[rank] == cuts[rank + 1]:
                continue
            starts[f"med.{name}"] = str(cuts[rank])
            for kind in ("weight", "momentum"):
                if f"{kind}/med.{name}" in whole:
                    piece = whole[f"{kind}/med.{name}"][cuts[rank] : cuts[rank + 1]]
                    pieces[f"{kind}/med.{name}"] = piece.contiguous()
        save_file(pieces, folder / f"rank_{rank:05d}.safetensors", starts)
    manifest = json.loads((folder / "manifest.json").read_text())
    for file in folder.glob("*.safetensors"):
        digest = xxhash.xxh3_64(file.read_bytes()).hexdigest()
        manifest["files"][file.name] = {"bytes": file.stat().st_size, "xxh3": digest}
    write_manifest(folder, manifest)
    state, expected = read_checkpoint(folder).state, read_checkpoint(ours).state
    assert_equal(state, expected)
    del manifest["files"]["rank_00001.safetensors"]
    write_manifest(folder, manifest)
    with pytest.raises(ValueError, match=r"\d+ elements of "):
        read_checkpoint(folder)


def test_weights_of_other_resolutions_keep_theirs(
    ours: Path, tmp_path: Path, vocabulary: Path
) -> None:
    """The checkpoint's image size is read from its position embeddings."""
    config = tiny_blip.config(vocabulary, VisionConfig("vit_tiny_patch16_224", 64, tiny_blip.SIZES))
    assert read_checkpoint(ours, config).config.vision.image_size == 32

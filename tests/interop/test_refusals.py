"""Checkpoints that can't be used are refused in one line that says why; nothing is written."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_blip
import torch
from safetensors.torch import load_file, save_file
from tiny_blip import Convert
from transformers import BertConfig, BertModel

from blip_scale.commands import convert_checkpoint
from blip_scale.inference.loading import Loading, load_blip
from blip_scale.interop.checkpoints import head_parameters, read_checkpoint
from blip_scale.interop.huggingface_config import inexpressible
from blip_scale.interop.salesforce import is_training_state
from blip_scale.model.vision import VisionConfig

Capture = pytest.CaptureFixture[str]


def refusal(capsys: Capture, source: Path, out: Path, *arguments: str) -> str:
    """Message of the command, which must fail and leave nothing behind."""
    before = sorted(out.parent.iterdir())
    capsys.readouterr()
    assert convert_checkpoint.main([str(source), str(out), *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("convert_checkpoint.py: ") and message.count("\n") == 1
    assert sorted(out.parent.iterdir()) == before
    return message


class Exploit:
    """Runs code when it is unpickled the unsafe way."""

    def __reduce__(self) -> tuple:
        return (print, ("it ran",))


@pytest.fixture
def pth(ours: Path, tmp_path: Path, convert: Convert) -> Path:
    return convert(ours, tmp_path / "blip.pth")


@pytest.fixture
def captioner(ours: Path, tmp_path: Path, convert: Convert) -> Path:
    return convert(ours, tmp_path / "captioner")


def test_files_that_are_damaged_or_unsafe(pth: Path, tmp_path: Path, capsys: Capture) -> None:
    out, bad = tmp_path / "out", tmp_path / "bad.pth"
    content = pth.read_bytes()
    bad.write_bytes(content[: len(content) // 2])
    assert "incomplete: the end of the file is missing" in refusal(capsys, bad, out)
    bad.write_bytes(b"")
    assert f"{bad} is damaged" in refusal(capsys, bad, out)
    bad.write_bytes(b"another file")  # whose first byte is an opcode
    assert f"{bad} is damaged" in refusal(capsys, bad, out)
    bad.write_bytes(b"no pickle at all")
    assert f"{bad} is not a PyTorch file, or damaged" in refusal(capsys, bad, out)
    torch.save({"model": {"a": torch.zeros(1)}, "extra": Exploit()}, bad)
    assert "holds more than tensors, and loading it could run any code" in refusal(capsys, bad, out)
    bad.write_bytes(pickle.dumps(Exploit()))
    refusal(capsys, bad, out)
    assert "it ran" not in capsys.readouterr().out
    assert "no such file or folder" in refusal(capsys, tmp_path / "nowhere", out)
    assert "is not a checkpoint: expected" in refusal(capsys, tmp_path, tmp_path / "out")


def test_files_of_other_models(pth: Path, tmp_path: Path, capsys: Capture) -> None:
    out, bad = tmp_path / "out", tmp_path / "bad.pth"
    torch.save({"model": {"bert.embeddings.weight": torch.zeros(2)}}, bad)
    assert "not a BLIP model: it holds bert" in refusal(capsys, bad, out)
    loaded = torch.load(pth, weights_only=True)
    for key, value, expected in (
        ("itm_head.weight", None, "missing: itm_head.weight"),
        ("itm_head.extra", torch.zeros(1), "left over: itm_head.extra"),
        ("itm_head.weight", torch.zeros(3, 48),
         "of another shape: itm_head.weight (3, 48), wanted (2, 48)"),
        ("text_decoder.cls.predictions.decoder.weight", torch.zeros(23, 48) + 1, None),
    ):  # fmt: skip
        state = dict(loaded["model"])
        if value is None:
            del state[key]
        else:
            state[key] = value
        torch.save(loaded | {"model": state}, bad)
        expected = expected or "isn't equal to text_decoder.bert.embeddings.word_embeddings.weight"
        assert expected in refusal(capsys, bad, out), key
    del loaded["network"]
    torch.save(loaded, bad)
    assert "does not state its number of text heads, and its width 48" in refusal(capsys, bad, out)


def test_a_training_state_that_is_not_whole_is_left_out(
    pth: Path, tmp_path: Path, convert: Convert, capsys: Capture
) -> None:
    """LAVIS writes queues without momentum copies: what is made of the weights needs neither."""
    loaded, part = torch.load(pth, weights_only=True), tmp_path / "part.pth"
    weights = {
        name: tensor for name, tensor in loaded["model"].items() if not is_training_state(name)
    }
    copies = {name: loaded["model"][name] for name in loaded["model"] if "_m." in name}
    queues = {name: loaded["model"][name] for name in ("image_queue", "text_queue", "queue_ptr")}
    for number, (more, problem) in enumerate((
        (queues, "(it lacks text_encoder_m.embeddings.LayerNorm.bias"),
        (copies, "(it lacks image_queue, queue_ptr, text_queue)"),
        (copies | queues | {"image_queue": torch.zeros(3, 5)}, "(it has another shape of image_q"),
        (copies | queues | {"idx_queue": torch.zeros(1)}, "(it has no place for idx_queue)"),
    )):  # fmt: skip
        torch.save(loaded | {"model": weights | more}, part)
        capsys.readouterr()
        out = convert(part, tmp_path / f"{number}.pth", "--head", "captioning")
        note = "note: its momentum copies and queues are incomplete and left out "
        assert note + problem in capsys.readouterr().out
        state = read_checkpoint(out).state
        assert state.keys() and all(torch.equal(t, weights[name]) for name, t in state.items())


def test_wrappers_and_prefixes_are_recognised(pth: Path, vocabulary: Path, tmp_path: Path) -> None:
    """Wrappers of DistributedDataParallel, torch.compile and Lightning; pickled Parameters."""
    loaded = torch.load(pth, weights_only=True)
    loading = Loading(tokenizer=str(vocabulary))
    expected, sizes = loaded["model"], {"network": loaded["network"]}
    prefixed = {f"module._orig_mod.{name}": tensor for name, tensor in expected.items()}
    parameters = dict(expected)
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            parameters[name] = torch.nn.Parameter(tensor)
    for content in (
        {"state_dict": expected},
        {"model": prefixed},
        {"model": {"state_dict": expected}, "epoch": 3},
        {"state_dict": parameters},
    ):
        torch.save(sizes | content, tmp_path / "wrapped.pth")
        weights = read_checkpoint(tmp_path / "wrapped.pth")
        assert weights.head == "pretrain" and weights.state.keys() == expected.keys()
        assert all(torch.equal(weights.state[name], t) for name, t in expected.items())
        assert load_blip(tmp_path / "wrapped.pth", loading).fingerprint
    torch.save({"epoch": 1, "weights": {}}, tmp_path / "wrapped.pth")
    with pytest.raises(ValueError, match=r"no state dict; .* it holds epoch, weights"):
        read_checkpoint(tmp_path / "wrapped.pth")


def test_refusals_say_what_a_file_is(pth: Path, tmp_path: Path, capsys: Capture) -> None:
    state = torch.load(pth, weights_only=True)["model"]
    file, out = tmp_path / "other.pth", tmp_path / "out"
    two = ("visual_encoder.", "text_encoder.")
    torch.save({"model": {n: t for n, t in state.items() if n.startswith(two)}}, file)
    assert "like BLIP's feature extractor: without proj" in refusal(capsys, file, out)
    words = {"text_encoder.embeddings.word_embeddings.weight": torch.zeros(30522, 768),
             "visual_encoder.patch_embed.proj.weight": torch.zeros(768, 3, 16, 16),
             "visual_encoder.blocks.0.mlp.fc1.weight": torch.zeros(3072, 768),
             "vision_proj.weight": torch.zeros(256, 768)}  # fmt: skip
    torch.save({"model": words}, file)
    assert "30522 rows, like bert-base-uncased and ALBEF: without [DEC]" in refusal(
        capsys, file, out
    )


def test_what_a_head_can_start_from(
    pth: Path, tmp_path: Path, convert: Convert, capsys: Capture
) -> None:
    """NLVR2 and VisDial need no decoder; a captioner has no encoder for them."""
    matcher = convert(pth, tmp_path / "matcher.pth", "--head", "retrieval")
    captioner = convert(pth, tmp_path / "captioner.pth", "--head", "captioning")
    config = read_checkpoint(pth).config
    whole = read_checkpoint(pth).state
    for head in ("nlvr2", "visdial"):
        state = head_parameters(matcher, head, config)
        name = "med.text_encoder.embeddings.word.weight"
        words = whole["text_encoder.embeddings.word_embeddings.weight"]
        assert torch.equal(state[name], words)
        expected = head_parameters(pth, head, config)
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
        with pytest.raises(ValueError, match=f"captioning .*; {head} starts from one of: pretrain"):
            head_parameters(captioner, head, config)
    with pytest.raises(ValueError, match="is a retrieval checkpoint; vqa starts from one of: pre"):
        head_parameters(matcher, "vqa", config)
    message = refusal(capsys, matcher, tmp_path / "out.pth", "--head", "nlvr2")
    assert "give the file as model.checkpoint to recipe finetune_nlvr2" in message


def test_another_tokenizer_is_named(ours: Path, tmp_path: Path, vocabulary: Path) -> None:
    """The error names the tokenizer, with and without sizes in the folder."""
    tokens = read_checkpoint(ours).config.text.vocab_size
    config = tiny_blip.config(vocabulary)
    other = replace(config, text=replace(config.text, vocab_size=tokens + 5))
    with pytest.raises(ValueError, match=f"vocabulary {tokens}, not {tokens + 5}; .*tokenizer"):
        read_checkpoint(ours, other)
    shutil.copytree(ours, tmp_path / "run")
    (tmp_path / "run" / "network.json").unlink()
    with pytest.raises(ValueError, match=f"of {tokens} tokens .* has {tokens + 5}: .*--tokenizer"):
        read_checkpoint(tmp_path / "run", other)
    assert read_checkpoint(tmp_path / "run", config).config.text.vocab_size == tokens


def test_folders_that_are_damaged_or_other_models(
    captioner: Path, tmp_path: Path, capsys: Capture
) -> None:
    out, weights = tmp_path / "out.pth", captioner / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert "damaged" in refusal(capsys, captioner, out)
    weights.write_bytes(content)
    tensors = load_file(weights)
    name = "vision_model.post_layernorm.bias"
    save_file({k: v for k, v in tensors.items() if k != name}, weights, {"format": "pt"})
    assert f"missing: {name}" in refusal(capsys, captioner, out)
    save_file(tensors | {name: torch.zeros(5)}, weights, {"format": "pt"})
    assert f"of another shape: {name}, wanted (48,)" in refusal(capsys, captioner, out)
    save_file(tensors | {"more": torch.zeros(5)}, weights, {"format": "pt"})
    assert "left over: more" in refusal(capsys, captioner, out)
    weights.unlink()
    assert f"{captioner} can't be read" in refusal(capsys, captioner, out)
    torch.save(tensors | {"extra": Exploit()}, captioner / "pytorch_model.bin")
    assert f"{captioner}" in refusal(capsys, captioner, out)
    assert "it ran" not in capsys.readouterr().out
    bert = tmp_path / "bert"
    BertModel(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                   intermediate_size=8)
    ).save_pretrained(bert)  # fmt: skip
    assert "holds BertModel (bert); expected BlipFor" in refusal(capsys, bert, out)


def test_an_older_folder_with_bin_weights_is_read(captioner: Path) -> None:
    """Published ones have pytorch_model.bin, with position_ids and without second names."""
    expected = read_checkpoint(captioner).state
    weights = captioner / "model.safetensors"
    tensors = load_file(weights)
    tensors.pop("text_decoder.cls.predictions.decoder.weight", None)
    tensors["text_decoder.bert.embeddings.position_ids"] = torch.arange(32)[None]
    torch.save(tensors, captioner / "pytorch_model.bin")
    weights.unlink()
    state = read_checkpoint(captioner).state
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_training_checkpoints_that_are_not_whole(
    ours: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out.pth"
    copy = tmp_path / "step_00000007"
    shutil.copytree(ours, copy)
    file = copy / "rank_00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-8])
    assert "is damaged: size or checksum" in refusal(capsys, copy, out)
    file.unlink()
    assert "rank_00000.safetensors is missing" in refusal(capsys, copy, out)
    file.write_bytes(content)
    network = json.loads((copy / "network.json").read_text())
    network["text"]["layers"] = 3
    (copy / "network.json").write_text(json.dumps(network))
    assert "holds another network: missing text.layers.2." in refusal(capsys, copy, out)
    (copy / "network.json").unlink()
    assert "give it with --recipe" in refusal(capsys, copy, out)


def test_what_exists_is_kept(
    ours: Path, captioner: Path, tmp_path: Path, convert: Convert, capsys: Capture
) -> None:
    before = (captioner / "model.safetensors").read_bytes()
    assert "exists; give another name, or --overwrite" in refusal(capsys, ours, captioner)
    assert (captioner / "model.safetensors").read_bytes() == before
    convert(ours, captioner, "--head", "retrieval", "--overwrite")
    assert read_checkpoint(captioner).head == "retrieval"
    other = tmp_path / "holiday"
    other.mkdir()
    (other / "photo.jpg").write_bytes(b"mine")
    assert "that this command wrote, and is not" in refusal(capsys, ours, other, "--overwrite")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_overwriting_deletes_conversions_alone(
    ours: Path, captioner: Path, pth: Path, tmp_path: Path, convert: Convert, capsys: Capture
) -> None:
    run = tmp_path / "run"
    step = shutil.copytree(ours, run / "checkpoints" / "step_00000007")
    link = tmp_path / "link"
    link.symlink_to(run)
    for source, out, message in (
        (run, run, "is the input"),
        (run, link, "is the input"),
        (step, run, "contains the input"),
        (run, run / "checkpoints" / "step_00000008", "lies in the input"),
        (captioner, run, "not a checkpoint that this command wrote"),
    ):
        assert message in refusal(capsys, source, out, "--overwrite")
    (captioner / "thesis.txt").write_text("years of work")
    assert "also holds thesis.txt" in refusal(capsys, ours, captioner, "--overwrite")
    (captioner / "thesis.txt").unlink()
    config = json.loads((captioner / "config.json").read_text())
    del config["output_settings"]
    (captioner / "config.json").write_text(json.dumps(config))
    assert "not a checkpoint that this" in refusal(capsys, ours, captioner, "--overwrite")
    for arguments in (("--to", "ours"), ("--head", "all"), ("--head", "all")):
        convert(ours, tmp_path / "out", *arguments, "--overwrite")
    link.unlink()
    link.symlink_to(pth)
    assert "not a checkpoint that this" in refusal(capsys, ours, link, "--overwrite")
    convert(ours, link.rename(tmp_path / "link.pth"), "--overwrite")
    assert (tmp_path / "link.pth").is_symlink() and read_checkpoint(pth).head == "pretrain"
    pth.write_bytes(b"another file")
    assert "not a checkpoint that this" in refusal(capsys, ours, pth, "--overwrite")


@pytest.mark.parametrize("name", ["out", "out.pth"])
def test_a_full_disk_is_one_line(ours: Path, tmp_path: Path, capsys: Capture, name: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        assert convert_checkpoint.main([str(ours), str(disk / name)]) == 1
        message = capsys.readouterr().err
        assert f"cannot write {disk / name}: the disk is full; free some space" in message
        assert message.count("\n") == 1 and not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_names_and_heads_that_contradict(ours: Path, tmp_path: Path, capsys: Capture) -> None:
    for out, arguments, expected in (
        ("out", ("--to", "salesforce"), "a name that ends in .pth"),
        ("out.pth", ("--to", "hf"), "the name of a folder"),
        ("out.pth", ("--head", "all"), "--head all writes Hugging Face folders"),
        ("out", ("--to", "ours", "--head", "vqa"), "training checkpoints hold the whole net"),
        ("out.pth", ("--head", "nlvr2"), "starts from the pretrain layout"),
        ("out", ("--head", "pretrain"), "transformers has no such class"),
        ("out", ("--tokenizer", str(tmp_path / "none")), "there is no folder"),
    ):
        assert expected in refusal(capsys, ours, tmp_path / out, *arguments), arguments


@pytest.mark.parametrize(
    ("vision", "expected"),
    [
        (VisionConfig("deit3_small_patch16_224", 32), "has nothing for ls1.gamma, ls2.gamma"),
        (VisionConfig("vit_small_patch16_224", 32, {"qk_norm": True}), "attn.k_norm.bias"),
        (VisionConfig("vit_small_patch16_224", 32, {"reg_tokens": 2}), "nothing for reg_token"),
        (VisionConfig("vit_small_patch16_224", 32, {"no_embed_class": True}), "class token has no"),
        (VisionConfig("vit_base_patch16_clip_quickgelu_224", 32), "norm_pre"),
        (VisionConfig("vit_small_patch16_224", 32, {"qkv_bias": False}), "blocks.0.attn.qkv.bias"),
    ],
)
def test_vits_that_hugging_face_has_not(
    vision: VisionConfig, expected: str, vocabulary: Path
) -> None:
    weights = tiny_blip.pretrained(tiny_blip.config(vocabulary, vision))
    weights.head = "captioning"
    assert expected in (inexpressible(weights) or "")


def test_answers_need_one_width(vocabulary: Path) -> None:
    wide = VisionConfig("vit_tiny_patch16_224", 32, tiny_blip.SIZES | {"embed_dim": 96})
    from blip_scale.interop.blip_weights import turned_into

    with pytest.raises(ValueError, match=r"question states of width 48.*image tokens of width 96"):
        turned_into(tiny_blip.pretrained(tiny_blip.config(vocabulary, wide)), "vqa")

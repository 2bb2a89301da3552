"""A whole run on captions in Chinese and Arabic, with a tokenizer made from them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_runs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from blip_scale.data.shards import Record, write_shards

ENGLISH = [*tiny_runs.COLOURS, *tiny_runs.SHAPES, "big", "small"]
CHINESE = "红色 绿色 蓝色 黄色 紫色 橙色 白色 黑色 圆盘 方块 横条 十字 大的 小的"
ARABIC = "أحمر أخضر أزرق أصفر بنفسجي برتقالي أبيض أسود قرص مربع شريط صليب كبير صغير"
IN_CHINESE = dict(zip(ENGLISH, CHINESE.split(), strict=True))
IN_ARABIC = dict(zip(ENGLISH, ARABIC.split(), strict=True))


def translated(record: Record, number: int) -> Record:
    """A drawing with a caption in Chinese and every second one in Arabic."""
    _, size, colour, shape = record.captions[0].split()[:4]
    text = f"一个{IN_CHINESE[size]}{IN_CHINESE[colour]}{IN_CHINESE[shape]}"
    if number % 2:
        text = f"{IN_ARABIC[shape]} {IN_ARABIC[colour]} {IN_ARABIC[size]}"
    return replace(record, caption=text)


def unigram(captions: list[str], folder: Path) -> None:
    """A tokenizer of XLM-R's kind, which encloses nothing by itself."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


@pytest.mark.multiprocess
def test_chinese_and_arabic_are_learned(tmp_path: Path) -> None:
    records = [translated(r, i) for i, r in enumerate(tiny_runs.records("world"))]
    write_shards(tmp_path / "world", records)
    unigram([record.captions[0] for record in records], tmp_path / "tokenizer")
    recipe = tiny_runs.make_recipe(
        tmp_path,
        model={"text": {"tokenizer": str(tmp_path / "tokenizer")}},
        data={
            "streams": [{"name": "world", "local": str(tmp_path / "world")}],
            "heldout": [{"name": "world", "local": str(tmp_path / "world")}],
            "augment": False,
        },
        train={"max_steps": 60},
        log={"every_steps": 20},
        evaluation={"max_caption_tokens": 16, "min_caption_tokens": 2, "captions": 8},
    )
    tiny_runs.train(recipe)
    losses = tiny_runs.losses(tmp_path / "run")
    assert losses[60]["loss/lm"] < 0.7 * losses[20]["loss/lm"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    truths = [caption["truth"] for caption in summary["captions"]]
    written = " ".join(caption["caption"] for caption in summary["captions"])
    assert set(truths) <= {record.captions[0] for record in records}
    assert re.search("[\u4e00-\u9fff]", written) or re.search("[\u0600-\u06ff]", written)
    assert not re.search("[a-z<>]", written)

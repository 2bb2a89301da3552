"""Caption generation: greedy search, beam search and nucleus sampling, with a KV cache.

The rules are those of Hugging Face's `generate`, which BLIP uses. Lengths include the prompt and
the final [SEP]. The repetition penalty also applies to the prompt's tokens. Beam search divides the
summed log-probability of a hypothesis by length ** length_penalty. The definition of this length
changed after transformers 4.15, the version that BLIP pins; see `BeamSettings.scoring`.

Shapes: I images, K beams, R = I * K rows (the beams of an image are adjacent), L tokens so far, V
vocabulary, H heads, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_scale.model.attention import AttentionLayout, Segments, attention, dense_segments
from blip_scale.model.med import LMHead, MEDConfig
from blip_scale.model.text import TextLayer, TextStack

NEVER = -1.0e9
"""Score of candidates that must not be selected."""

Scoring = Literal["published", "huggingface"]


class Writer(Protocol):
    """Network that generates captions: a MED, or another network with a decoder."""

    config: MEDConfig
    lm_head: LMHead
    training: bool

    @property
    def text(self) -> TextStack:
        """The stack that holds the decoder."""


@dataclass(frozen=True)
class BeamSettings:
    """Settings of beam search. The defaults are BLIP's for COCO captions."""

    num_beams: int = 3
    """Number of beams; 1 is greedy search."""
    max_length: int = 20
    """Maximum number of tokens, including the prompt and [SEP]."""
    min_length: int = 5
    """Number of tokens, including the prompt, before which [SEP] is not allowed."""
    length_penalty: float = 1.0
    """Exponent of the length. Above 0 favours long captions, below 0 short ones."""
    repetition_penalty: float = 1.0
    """Penalty of tokens that already occur (Keskar et al. 2019). Values above 1 make them less
    likely."""
    captions: int = 1
    """Number of captions returned for each image, best first; at most num_beams."""
    scoring: Scoring = "published"
    """Length that divides a hypothesis' score. `published` is the rule of transformers 4.15, which
    produced BLIP's results: it counts the prompt but not [SEP]. `huggingface` is the current rule:
    it counts [SEP] but not the prompt. Greedy search is equal under both."""


@dataclass(frozen=True)
class NucleusSettings:
    """Nucleus sampling (Holtzman et al. 2020). The defaults are BLIP's."""

    top_p: float = 0.9
    """Probability mass of the nucleus: the smallest set of tokens that holds it is kept."""
    top_k: int = 50
    """Number of most likely tokens from which the nucleus is taken."""
    temperature: float = 1.0
    max_length: int = 30
    """Maximum number of tokens, including the prompt and [SEP]."""
    min_length: int = 10
    """Number of tokens, including the prompt, before which [SEP] is not allowed."""
    repetition_penalty: float = 1.1

    def __post_init__(self) -> None:
        """Refuse values with which no token can be sampled."""
        limits = {
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "top_k": (self.top_k >= 1, "at least 1"),
            "temperature": (0 < self.temperature < torch.inf, "above 0"),
            "repetition_penalty": (0 < self.repetition_penalty < torch.inf, "above 0"),
        }
        for name, (is_possible, wanted) in limits.items():
            if not is_possible:
                raise ValueError(f"nucleus sampling: {name} is {getattr(self, name)}, not {wanted}")


@torch.no_grad()
def caption_beam(
    med: Writer,
    image_embeds: Tensor,
    prompt_ids: Sequence[int],
    settings: BeamSettings | None = None,
    contexts: Segments | None = None,
) -> list[list[int]]:
    """Generate the best captions of each image by beam search.

    Args:
        med: a MED in eval mode that is not partitioned.
        image_embeds: [I, N, D] from `med.encode_image`.
        prompt_ids: start of every caption: [DEC] and the tokens of the prompt, without [SEP].
        settings: settings of the search. None: the defaults.
        contexts: boundaries of the contexts in image_embeds, which is then [1, T, D]. For a decoder
            whose contexts differ in length (VQA). None: each image is one context.

    Returns:
        Token ids after the prompt, without [SEP]. The `settings.captions` captions of an image or
        context are adjacent.

    Raises:
        ValueError: `settings.captions` exceeds the number of beams, `settings.max_length` doesn't
            fit, or `med` is in training mode.
    """
    settings = settings or BeamSettings()
    if not 1 <= settings.captions <= settings.num_beams:
        raise ValueError(
            f"captions is {settings.captions}: beam search of width {settings.num_beams} finds "
            f"1 to {settings.num_beams} captions of an image; give more beams, or sample"
        )
    decoder = _begin(med, (image_embeds, contexts), prompt_ids, settings)
    if settings.num_beams == 1:
        return _one_by_one(decoder, settings, lambda logits: logits.argmax(-1))
    return _beam_search(decoder, settings)


@torch.no_grad()
def caption_nucleus(
    med: Writer,
    image_embeds: Tensor,
    prompt_ids: Sequence[int],
    settings: NucleusSettings | None = None,
    draws_IL: Tensor | None = None,
) -> list[list[int]]:
    """Generate one caption of each image by nucleus sampling.

    Args:
        med: see `caption_beam`.
        image_embeds: see `caption_beam`.
        prompt_ids: see `caption_beam`.
        settings: settings of the sampling. None: the defaults.
        draws_IL: fp32 [I, max_length] in [0, 1): the random number that selects each token. A
            caption then depends only on its row, not on the rest of the batch. None: draw from the
            global generator.

    Returns:
        Token ids of each image's caption after the prompt, without [SEP].
    """
    settings = settings or NucleusSettings()
    decoder = _begin(med, (image_embeds, None), prompt_ids, settings)

    def draw(logits_RV: Tensor) -> Tensor:
        probabilities = nucleus(logits_RV, settings).softmax(-1)
        if draws_IL is None:
            return torch.multinomial(probabilities, 1).squeeze(-1)
        place = decoder.sequences_RL.shape[1]
        shares = probabilities.cumsum(-1)
        shares = shares / shares[:, -1:]  # the last value is exactly 1, above every draw
        drawn = draws_IL[:, place, None].to(shares).contiguous()
        return torch.searchsorted(shares, drawn, right=True).squeeze(-1)

    return _one_by_one(decoder, settings, draw)


def nucleus(logits_RV: Tensor, settings: NucleusSettings) -> Tensor:
    """Set logits [R, V] outside top_k and the nucleus to -inf. The most likely token stays."""
    logits_RV = logits_RV / settings.temperature
    kept, tokens = logits_RV.topk(min(settings.top_k, logits_RV.shape[-1]))
    # Drop a token if more likely tokens already hold top_p. The first token is never dropped.
    shares = kept.softmax(-1)
    kept = kept.masked_fill(shares.cumsum(-1) - shares >= settings.top_p, -torch.inf)
    return torch.full_like(logits_RV, -torch.inf).scatter(-1, tokens, kept)


_Seen = tuple[Tensor, Segments | None]
"""image_embeds, and the boundaries of the contexts in them (None: each image is one context)."""


class _Decoder:
    """Captions being generated, one per row, with the cached keys and values of every layer."""

    def __init__(self, med: Writer, seen: _Seen, prompt_ids: Sequence[int], beams: int) -> None:
        image_embeds, contexts = seen
        images, tokens, _ = image_embeds.shape
        if contexts is None:
            self._image_keys = dense_segments(images, tokens, image_embeds.device)
        else:
            self._image_keys = contexts.padded(tokens)
        self.med, self.beams, self.images = med, beams, self._image_keys.count
        self.prompt_length = len(prompt_ids)
        prompt = torch.tensor(prompt_ids, dtype=torch.int64, device=image_embeds.device)
        self.sequences_RL = prompt.repeat(self.images * beams, 1)
        self._layers = [layer for layer in med.text.layers if isinstance(layer, TextLayer)]
        self._image_kv = [x.cross_attention.project_images(image_embeds) for x in self._layers]
        self._kv: list[tuple[Tensor, Tensor]] = []

    def logits(self) -> Tensor:
        """Compute next-token logits [R, V] fp32. Only tokens added since the last call are run."""
        rows, length = self.sequences_RL.shape
        seen = self._kv[0][0].shape[1] if self._kv else 0
        new_ids = self.sequences_RL[:, seen:]
        device = new_ids.device
        positions = torch.arange(seen, length, device=device).repeat(rows)
        hidden = self.med.text.embeddings(new_ids.flatten(), positions)
        new = length - seen
        keys = dense_segments(rows, length, device)
        queries = keys if seen == 0 else dense_segments(rows, new, device)
        self_layout = AttentionLayout(queries, keys, causal=seen == 0)
        grouped = dense_segments(self.images, self.beams * new, device)
        cross_layout = AttentionLayout(grouped, self._image_keys)
        for number, layer in enumerate(self._layers):
            self_attention = layer.self_attention_decoder
            q, k, v = self_attention.project(hidden)
            k, v = self._grow(number, k.unflatten(0, (rows, new)), v.unflatten(0, (rows, new)))
            kernel = self_attention.kernel
            context = attention(q, k.flatten(0, 1), v.flatten(0, 1), self_layout, kernel=kernel)
            hidden = self_attention.finish(hidden, context)
            hidden = layer.cross_attention.attend(hidden, *self._image_kv[number], cross_layout)
            hidden = layer.mlp(hidden)
        return self.med.lm_head(hidden.unflatten(0, (rows, new))[:, -1]).float()

    def _grow(self, number: int, k_RLHC: Tensor, v_RLHC: Tensor) -> tuple[Tensor, Tensor]:
        if number == len(self._kv):
            self._kv.append((k_RLHC.contiguous(), v_RLHC.contiguous()))
        else:
            k, v = self._kv[number]
            self._kv[number] = torch.cat([k, k_RLHC], 1), torch.cat([v, v_RLHC], 1)
        return self._kv[number]

    def extend(self, tokens_R: Tensor, rows_R: Tensor | None = None) -> None:
        """Set row r to row rows_R[r] followed by tokens_R[r]. None: append to row r itself."""
        if rows_R is not None:
            self.sequences_RL = self.sequences_RL.index_select(0, rows_R)
            self._kv = [(k.index_select(0, rows_R), v.index_select(0, rows_R)) for k, v in self._kv]
        self.sequences_RL = torch.cat([self.sequences_RL, tokens_R[:, None]], 1)


def _begin(
    med: Writer,
    seen: _Seen,
    prompt_ids: Sequence[int],
    settings: BeamSettings | NucleusSettings,
) -> _Decoder:
    beams = settings.num_beams if isinstance(settings, BeamSettings) else 1
    max_length = settings.max_length
    if med.training:
        raise ValueError("captions need a MED in eval mode: call med.eval() first")
    if beams < 1:
        raise ValueError(f"num_beams is {beams}; 1 is greedy search, more is beam search")
    positions = med.config.text.max_positions
    if not len(prompt_ids) < max_length <= positions:
        raise ValueError(
            f"max_length {max_length} counts the prompt: it must be above its {len(prompt_ids)} "
            f"tokens and at most the text stack's {positions} positions"
        )
    return _Decoder(med, seen, prompt_ids, beams)


def _restrain(
    scores_RV: Tensor, decoder: _Decoder, settings: BeamSettings | NucleusSettings
) -> Tensor:
    """Apply the repetition penalty, and exclude [SEP] before min_length."""
    if settings.repetition_penalty != 1.0:
        there = scores_RV.gather(1, decoder.sequences_RL)
        penalty = settings.repetition_penalty
        there = torch.where(there < 0, there * penalty, there / penalty)
        scores_RV = scores_RV.scatter(1, decoder.sequences_RL, there)
    if decoder.sequences_RL.shape[1] < settings.min_length:
        sep = torch.tensor([decoder.med.config.text.special.sep], device=scores_RV.device)
        scores_RV = scores_RV.index_fill(1, sep, -torch.inf)
    return scores_RV


def _one_by_one(
    decoder: _Decoder,
    settings: BeamSettings | NucleusSettings,
    choose: Callable[[Tensor], Tensor],
) -> list[list[int]]:
    sep = decoder.med.config.text.special.sep
    done = torch.zeros(decoder.images, dtype=torch.bool, device=decoder.sequences_RL.device)
    while decoder.sequences_RL.shape[1] < settings.max_length and not bool(done.all()):
        tokens = choose(_restrain(decoder.logits(), decoder, settings)).masked_fill(done, sep)
        done = done | (tokens == sep)
        decoder.extend(tokens)
    return _without_sep(decoder.sequences_RL[:, decoder.prompt_length :], sep)


def _without_sep(sequences_IL: Tensor, sep: int) -> list[list[int]]:
    captions = sequences_IL.tolist()
    return [ids[: ids.index(sep)] if sep in ids else ids for ids in captions]


@dataclass
class _Hypotheses:
    """The K best finished captions of each image, in descending order."""

    sequences_IKL: Tensor
    """Token ids, padded with [SEP] to the longest length so far."""
    scores_IK: Tensor
    finished_IK: Tensor

    def add(self, sequences_IKL: Tensor, scores_IK: Tensor, finished_IK: Tensor, sep: int) -> None:
        """Merge candidates into the best ones. Unfinished candidates have the score NEVER."""
        missing = sequences_IKL.shape[-1] - self.sequences_IKL.shape[-1]
        old = F.pad(self.sequences_IKL, (0, missing), value=sep)
        sequences = torch.cat([old, sequences_IKL], 1)
        scores = torch.cat([self.scores_IK, scores_IK], 1)
        finished = torch.cat([self.finished_IK, finished_IK], 1)
        self.scores_IK, best = scores.topk(self.scores_IK.shape[1])
        self.sequences_IKL = _take(sequences, best)
        self.finished_IK = finished.gather(1, best)

    def worst(self) -> Tensor:
        """Return the lowest kept score [I, K], and NEVER in free places."""
        lowest = self.scores_IK.min(1, keepdim=True).values
        return torch.where(self.finished_IK, lowest, NEVER)


def _take(sequences_IKL: Tensor, index_IJ: Tensor) -> Tensor:
    """Select the sequences index_IJ of each image, [I, J, L]."""
    return sequences_IKL.take_along_dim(index_IJ[:, :, None], 1)


def _beam_search(decoder: _Decoder, settings: BeamSettings) -> list[list[int]]:
    sep = decoder.med.config.text.special.sep
    images, beams, is_published = (
        decoder.images,
        settings.num_beams,
        settings.scoring == "published",
    )
    start_IKL = decoder.sequences_RL.unflatten(0, (images, beams))
    free = torch.full((images, beams), NEVER, device=start_IKL.device)
    best = _Hypotheses(start_IKL, free, torch.zeros_like(free, dtype=torch.bool))
    running_IK = free.clone()
    running_IK[:, 0] = 0.0  # all beams start equal, so only the first may branch
    improvable_I1 = torch.ones_like(free[:, :1], dtype=torch.bool)
    first_row_I1 = torch.arange(0, images * beams, beams, device=start_IKL.device)[:, None]
    while True:
        log_probs_RV = _restrain(decoder.logits().log_softmax(-1), decoder, settings)
        vocabulary = log_probs_RV.shape[1]
        totals = running_IK[:, :, None] + log_probs_RV.unflatten(0, (images, beams))
        # Take 2 K candidates: if the best K all end here, K others remain to be continued.
        scores_IJ, chosen_IJ = totals.flatten(1).topk(2 * beams)
        parents_IJ, tokens_IJ = chosen_IJ // vocabulary, chosen_IJ % vocabulary
        length = decoder.sequences_RL.shape[1]
        at_limit = length + 1 >= settings.max_length
        ended_IJ = tokens_IJ == sep
        if at_limit and not is_published:
            ended_IJ = torch.ones_like(ended_IJ)
        written = length if is_published else length + 1 - decoder.prompt_length
        divisor = written**settings.length_penalty

        counts_IJ = ended_IJ & improvable_I1
        counts_IJ[:, beams:] = False  # a finished caption must be among the best K
        final_IJ = torch.where(counts_IJ, scores_IJ / divisor, NEVER)
        sequences = decoder.sequences_RL.unflatten(0, (images, beams))
        sequences = torch.cat([_take(sequences, parents_IJ), tokens_IJ[:, :, None]], -1)
        best.add(sequences, final_IJ, counts_IJ, sep)

        running_IK, next_IK = (scores_IJ + ended_IJ * NEVER).topk(beams)
        hope_I1 = scores_IJ[:, :1] if is_published else running_IK[:, :1]
        improvable_I1 = improvable_I1 & (hope_I1 / divisor > best.worst()).any(1, keepdim=True)
        if at_limit or not bool(improvable_I1.any()):
            break
        rows = (first_row_I1 + parents_IJ.gather(1, next_IK)).flatten()
        decoder.extend(tokens_IJ.gather(1, next_IK).flatten(), rows)
    if is_published and at_limit:  # keep unfinished captions without [SEP]
        open_IK = improvable_I1.expand(-1, beams)
        final_IK = torch.where(open_IK, running_IK / (length + 1) ** settings.length_penalty, NEVER)
        best.add(_take(sequences, next_IK), final_IK, open_IK, sep)
    chosen_SL = best.sequences_IKL[:, : settings.captions].flatten(0, 1)
    return _without_sep(chosen_SL[:, decoder.prompt_length :], sep)

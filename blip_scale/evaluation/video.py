"""Zero-shot text-video retrieval (MSRVTT): a retrieval network encodes some frames as images.

As published, a video's feature is the mean of its frames' projected class tokens, normalised. For
re-ranking, the tokens of all frames form one sequence.

Legend: I videos, F frames of each, S texts, N image tokens, D width.
"""

from __future__ import annotations

from itertools import chain

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast

from blip_scale.config.recipe import Recipe
from blip_scale.data.heldout.videos import VideoSet
from blip_scale.evaluation import captions_and_pairs, retrieval
from blip_scale.inference.inputs import to_pixels
from blip_scale.model.med import MED


@torch.no_grad()
def video_retrieval(
    med: MED,
    videos: VideoSet,
    frames: int,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
) -> dict[str, float]:
    """Compute `retrieval.retrieval_figures`, and the median rank of the re-ranked videos.

    The median is named `text_to_video_median_rank`. The work is divided among the ranks.
    """
    texts = captions_and_pairs.Texts(
        list(chain.from_iterable(videos.captions)), recipe, tokenizer, med
    )
    embeds, features, sentences = [], [], []
    for indices in captions_and_pairs.my_batches(len(videos), 1):
        pixels = to_pixels(videos.frames(indices[0], frames), med)
        tokens_FND = med.encode_image(pixels)
        embeds.append(tokens_FND.flatten(0, 1)[None])
        mean = med.vision_proj(tokens_FND[:, 0]).float().mean(0, keepdim=True)
        features.append(F.normalize(mean, dim=-1))
    for indices in captions_and_pairs.my_batches(texts.count, recipe.evaluation.batch_size):
        sentences.append(med.project_text(med.encode_text(texts.plain(indices))))
    gathered = captions_and_pairs.gathered_features(med, embeds, features, sentences)
    settings = recipe.evaluation
    reranked_2IS = retrieval.rerank(
        med, gathered, texts.matching, settings.rerank_top_k, settings.batch_size
    )
    owners_S = captions_and_pairs.owners_of(videos.captions)
    cosines_IS = gathered.image_features @ gathered.text_features.T
    figures = retrieval.retrieval_figures(cosines_IS, reranked_2IS, owners_S)
    owners_S = owners_S.to(cosines_IS.device)
    own_1S = reranked_2IS[1].gather(0, owners_S[None])
    ranks_S = (~(reranked_2IS[1] < own_1S)).sum(0)  # comparisons with NaN are False
    named = {name.replace("image", "video"): value for name, value in figures.items()}
    return named | {"text_to_video_median_rank": float(ranks_S.median())}

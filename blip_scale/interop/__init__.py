"""Weights of others, in and out: Hugging Face BLIP, Salesforce's files, BERT, timm ViTs."""

from blip_scale.interop.bert import from_bert, load_bert
from blip_scale.interop.blip_weights import BlipWeights, turned_into, with_training_state
from blip_scale.interop.checkpoints import (
    Format,
    format_of,
    grown,
    head_parameters,
    load_checkpoint,
    read_checkpoint,
)
from blip_scale.interop.heads import (
    OWN_NETWORKS,
    PREFIX,
    build_network,
    cut_down,
    expected_shapes,
    from_published,
    shapes_of,
)
from blip_scale.interop.huggingface import write_huggingface
from blip_scale.interop.huggingface_config import CLASSES, inexpressible
from blip_scale.interop.model_card import Origin, model_card
from blip_scale.interop.salesforce import HEADS, PARTS, Head, from_salesforce, to_salesforce
from blip_scale.interop.salesforce_files import read_salesforce, write_salesforce
from blip_scale.interop.task_names import task_from_published, task_to_published
from blip_scale.interop.training_checkpoints import step_folder, write_training_checkpoint
from blip_scale.interop.vision import interpolate_positions, load_vision

__all__ = [
    "CLASSES",
    "HEADS",
    "OWN_NETWORKS",
    "PARTS",
    "PREFIX",
    "BlipWeights",
    "Format",
    "Head",
    "Origin",
    "build_network",
    "cut_down",
    "expected_shapes",
    "format_of",
    "from_bert",
    "from_published",
    "from_salesforce",
    "grown",
    "head_parameters",
    "inexpressible",
    "interpolate_positions",
    "load_bert",
    "load_checkpoint",
    "load_vision",
    "model_card",
    "read_checkpoint",
    "read_salesforce",
    "shapes_of",
    "step_folder",
    "task_from_published",
    "task_to_published",
    "to_salesforce",
    "turned_into",
    "with_training_state",
    "write_huggingface",
    "write_salesforce",
    "write_training_checkpoint",
]

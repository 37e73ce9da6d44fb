"""CLIP models of any open_clip architecture: load, encode, build heads from prompts, interpolate, export.

    u = normalise(f(x))                                          image features (N, D)
    l = normalise(value path of f's last attention)              patch features (N, P, D), `robustft.clip.patches`
    v = normalise(g(t))                                          text features (M, D)
    w_c = normalise(mean_t normalise(g(template_t(name_c))))     class embeddings (K, D)
    z = s u w^T,  s = exp(model.logit_scale)                     zero-shot logits (N, K)
    theta = (1 - a) theta_zs + a theta_ft                        WiSE-FT weights

A model is used through `encode_image`, `encode_text` and `logit_scale` alone, never through `forward`, whose
output differs between open_clip's versions and settings. A `Bundle` carries the configuration its model was
built from, so that every model can be exported as a directory that open_clip itself loads: nothing (the
activation, the context length, the image statistics) is left to be guessed from a name.
"""

from robustft.clip.adapters import TOWERS, LoRA, adapt, copied, has_adapters, merged
from robustft.clip.computation import check_same_computation
from robustft.clip.depth import depths
from robustft.clip.encoding import (
    LocalFeatures,
    encode_embedded_texts,
    encode_images,
    encode_images_and_patches,
    encode_patches,
    encode_texts,
    logit_bias,
    logit_scale,
    text_tower,
    token_embedding,
    trim_padding,
    unwrap,
)
from robustft.clip.exporting import CARD_FILE, export
from robustft.clip.features import Features, encode
from robustft.clip.heads import (
    CaptionGroups,
    caption_embeddings,
    class_embeddings,
    encode_captions,
    group_captions,
    grouped_embeddings,
)
from robustft.clip.library import import_open_clip
from robustft.clip.loading import CLASSIFIER_FILE, CONFIG_FILE, WEIGHTS_FILE, Bundle, eval_transform, load
from robustft.clip.outputs import Outputs, evaluating, outputs_of, similarities
from robustft.clip.projections import feature_width, text_projection, visual_projection
from robustft.clip.weights import (
    average_states,
    check_trainable_precision,
    fingerprint,
    half_precision_parameters,
    interpolate,
    interpolate_entries,
    interpolate_state,
    stock_state,
)
from robustft.data.sources import batches, image_statistics

__all__ = [
    "CARD_FILE",
    "CLASSIFIER_FILE",
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "Bundle",
    "CaptionGroups",
    "Features",
    "LoRA",
    "LocalFeatures",
    "Outputs",
    "TOWERS",
    "adapt",
    "average_states",
    "batches",
    "caption_embeddings",
    "check_same_computation",
    "check_trainable_precision",
    "class_embeddings",
    "copied",
    "depths",
    "encode",
    "encode_captions",
    "encode_embedded_texts",
    "encode_images",
    "encode_images_and_patches",
    "encode_patches",
    "encode_texts",
    "eval_transform",
    "evaluating",
    "export",
    "feature_width",
    "fingerprint",
    "group_captions",
    "grouped_embeddings",
    "half_precision_parameters",
    "has_adapters",
    "image_statistics",
    "import_open_clip",
    "interpolate",
    "interpolate_entries",
    "interpolate_state",
    "load",
    "logit_bias",
    "logit_scale",
    "merged",
    "outputs_of",
    "similarities",
    "stock_state",
    "text_projection",
    "text_tower",
    "token_embedding",
    "trim_padding",
    "unwrap",
    "visual_projection",
]

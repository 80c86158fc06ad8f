"""What the image towers of CLIP and SigLIP have in common in transformers: the names."""

from __future__ import annotations

from toolchain.surgery.huggingface.names import Left, Rules

OTHER_TOWER: Rules = (
    (r"(?:text_model|text_projection)\..*|text_projection|logit_scale|logit_bias", Left("it belongs to the texts")),
)
_OWN = r"(?:vision_model\.)?"
_LAYER = _OWN + r"encoder\.layers\.(\d+)\."


def tower_rules() -> Rules:
    """Names of a tower, alone or under "vision_model."."""
    return (
        (_OWN + r"embeddings\.patch_embedding\.(\w+)", r"patch_embed.proj.\1"),
        (_OWN + r"embeddings\.position_embedding\.weight", "pos_embed"),
        (_OWN + r"embeddings\.position_ids", Left("timm counts by itself")),
        (_LAYER + r"self_attn\.q_proj\.(\w+)", r"blocks.\1.attn.query.\2"),
        (_LAYER + r"self_attn\.k_proj\.(\w+)", r"blocks.\1.attn.key.\2"),
        (_LAYER + r"self_attn\.v_proj\.(\w+)", r"blocks.\1.attn.value.\2"),
        (_LAYER + r"self_attn\.out_proj\.(\w+)", r"blocks.\1.attn.proj.\2"),
        (_LAYER + r"layer_norm(\d)\.(\w+)", r"blocks.\1.norm\2.\3"),
        (_LAYER + r"mlp\.(fc\d)\.(\w+)", r"blocks.\1.mlp.\2.\3"),
        (_OWN + r"post_layernorm\.(\w+)", r"norm.\1"),
        (r"classifier\.(\w+)", r"head.\1"),
    )

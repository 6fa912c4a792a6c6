"""What the generic shrinking cannot know, by model type: ``{type: {"field" or "sub_config.field": value}}``."""

from typing import Any

RESNET: dict[str, Any] = {
    # By default these types take a large backbone of timm's; a resnet of transformers is the other documented way.
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "out_features": ["stage2", "stage3", "stage4"],
    },
}
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16}  # heads times size is twice the hidden size
VOCABULARY: dict[str, Any] = {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6}}
AUDIO_FILTERS: dict[str, Any] = {"num_filters": 4, "hidden_size": 64}
ROPES = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")}
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}  # half a head of 16
EXPERTS: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
INDEXER: dict[str, Any] = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 1000,
}
SMALL_TIMM = "test_vit"


def _under(prefix: str, table: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{key}": value for key, value in table.items()}


OVERRIDES: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 4},
    "bamba": MAMBA,
    "chameleon": VOCABULARY,
    "cohere_compass": {"text_config.rope_parameters": ROPES},
    "cohere_compass_text": {"rope_parameters": ROPES},
    "conditional_detr": RESNET,
    "cosmos3_edge": {"text_config.rope_parameters": SECTIONS},
    "cosmos3_edge_text": {"rope_parameters": SECTIONS},
    "csm": {"codec_config.upsample_groups": 64},
    "cvt": {"depth": (1, 2, 3)},
    "dab-detr": RESNET,
    "dbrx": {"attn_config.rope_theta": 10000.0},
    "deepseek_ocr2": _under("text_config", EXPERTS | {"mlp_layer_types": ["dense", "sparse"]}),
    "deformable_detr": RESNET,
    "detr": RESNET,
    "diffusion_gemma": _under("text_config", {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}),
    "dots1": EXPERTS | {"n_shared_experts": 1},
    "dots3_note": {"text_config.num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "emu3": VOCABULARY,
    "ernie4_5_vl_moe": _under(
        "text_config",
        # heads of 128: the rotary sections are constants of the code
        {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "moe_intermediate_size": [64, 32]},
    ),
    "esm": {"pad_token_id": 1},
    "fast_vlm": {"vision_config.architecture": "fastvit_t8"},
    "gemma3n": {"text_config.num_kv_shared_layers": 0, "vision_config.architecture": "mobilenetv4_conv_small"},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma3n_vision": {"architecture": "mobilenetv4_conv_small"},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2", "spatial_target_layers": [0, 1]},
    "granitemoehybrid": MAMBA,
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl": {"text_config.head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16},
    "informer": {"prediction_length": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mimi": {"upsample_groups": 64},
    "ministral": {"head_dim": 16},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "muse_spark": {"audio_config.num_hidden_layers": 4},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "nemotron": {"num_key_value_heads": 2},
    "omdet-turbo": RESNET,
    "pe_audio_video": {"audio_video_config.video_config.vision_config.architecture": SMALL_TIMM},
    "pe_audio_video_encoder": {"video_config.vision_config.architecture": SMALL_TIMM},
    "pe_video": {"video_config.vision_config.architecture": SMALL_TIMM},
    "pe_video_encoder": {"vision_config.architecture": SMALL_TIMM},
    "qwen3_omni_moe": {
        "talker_config.spatial_merge_size": 2,
        "talker_config.text_config.shared_expert_intermediate_size": 64,
    },
    "qwen4_exp": _under("text_config", INDEXER),
    "qwen4_exp_text": INDEXER,
    "seggpt": {"merge_index": 0, "intermediate_hidden_state_indices": [1, 2, 3, 4], "num_hidden_layers": 5},
    "t5gemma2_encoder": {"text_config.dropout_rate": 0.0},
    "table-transformer": RESNET,
    "time_series_transformer": {"prediction_length": 4},
    "timm_backbone": {"backbone": "test_resnet"},
    "vibevoice": _under("audio_config", AUDIO_FILTERS) | _under("semantic_model_config", AUDIO_FILTERS),
    "vibevoice_asr": _under("acoustic_tokenizer_encoder_config", AUDIO_FILTERS)
    | _under("semantic_tokenizer_encoder_config", AUDIO_FILTERS),
    "vibevoice_acoustic_tokenizer": AUDIO_FILTERS,
    "vibevoice_acoustic_tokenizer_decoder": AUDIO_FILTERS,
    "vibevoice_acoustic_tokenizer_encoder": AUDIO_FILTERS,
    "vitmatte": {"fusion_hidden_sizes": [32, 16, 16, 8], "convstream_hidden_sizes": [8, 8, 16]},
    "zamba": {"num_hidden_layers": 12},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
}

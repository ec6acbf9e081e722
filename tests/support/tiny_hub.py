"""Tiny models of the transformers library with random weights, each saved in a folder as the hub's are."""

from pathlib import Path
from typing import Any

BLIP_WORDS = ("a", "cat", "dog", "on", "sand")


def _spread_weights(model: Any) -> None:
    """With a new model's own weights, it says the same of all pictures."""
    import torch

    for weights in model.parameters():
        if weights.ndim > 1:
            torch.nn.init.normal_(weights, std=0.7)


def save_all(root: Path, **models: Any) -> dict[str, str]:
    """Saves models into folders of a root; returns what flags say to open them."""
    for name, save in models.items():
        (root / name).mkdir()
        save(root / name)
    return {name: f"transformers:{root / name}" for name in models}


def save_grounding_dino(folder: Path) -> None:
    import torch
    import transformers

    backbone = transformers.SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "cat", "dog", "?"]
    (folder / "vocab.txt").write_text("\n".join(words))
    text = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config = transformers.GroundingDinoConfig(
        backbone_config=backbone, text_config=text, d_model=32, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=20,
        max_text_len=16,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GroundingDinoForObjectDetection(config).save_pretrained(folder)
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    images = transformers.GroundingDinoImageProcessor(size={"shortest_edge": 96, "longest_edge": 128})
    transformers.GroundingDinoProcessor(images, tokenizer).save_pretrained(folder)


def save_sam(folder: Path) -> None:
    import torch
    import transformers

    config = transformers.SamConfig(
        vision_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16,
                           num_pos_feats=8, output_channels=16, global_attn_indexes=[0], window_size=2, mlp_dim=16),
        prompt_encoder_config=dict(hidden_size=16, image_size=64, patch_size=16, image_embedding_size=4),
        mask_decoder_config=dict(hidden_size=16, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2,
                                 iou_head_hidden_dim=16),
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.SamModel(config).save_pretrained(folder)
    images = transformers.SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    transformers.SamProcessor(images).save_pretrained(folder)


def save_blip(folder: Path) -> None:
    import torch
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *BLIP_WORDS]
    (folder / "vocab.txt").write_text("\n".join(words))
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, projection_dim=16)
    text = sizes | dict(vocab_size=len(words), encoder_hidden_size=16, max_position_embeddings=64)
    text |= dict(bos_token_id=5, pad_token_id=0, eos_token_id=3, sep_token_id=3)
    config = transformers.BlipConfig(text_config=text, vision_config=sizes | dict(image_size=32, patch_size=16))
    torch.manual_seed(0)
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    transformers.BlipProcessor(images, transformers.BertTokenizerFast(str(folder / "vocab.txt"))).save_pretrained(
        folder
    )


def save_blip2(folder: Path) -> None:
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    words = ["<s>", "<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ends = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>")
    tokenizer = transformers.GPT2Tokenizer(vocab={word: k for k, word in enumerate(words)}, merges=[], **ends)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.Blip2Config(
        vision_config=sizes | dict(image_size=32, patch_size=16),
        qformer_config=sizes | dict(encoder_hidden_size=16, vocab_size=30),
        text_config=dict(model_type="opt", vocab_size=len(tokenizer), hidden_size=16, ffn_dim=16, num_hidden_layers=1,
                         num_attention_heads=2, word_embed_proj_dim=16, max_position_embeddings=128, bos_token_id=0,
                         pad_token_id=1, eos_token_id=2),
        num_query_tokens=4, image_token_index=len(tokenizer) - 1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Blip2ForConditionalGeneration(config)
    _spread_weights(model)
    model.save_pretrained(folder)
    images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    transformers.Blip2Processor(images, tokenizer, num_query_tokens=4).save_pretrained(folder)


def save_sam2(folder: Path) -> None:
    import torch
    import transformers

    backbone = dict(
        model_type="sam2_hiera_det_model", hidden_size=8, num_attention_heads=1, image_size=[64, 64],
        blocks_per_stage=[1, 2, 1, 1], embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[4, 4, 4, 2], global_attention_blocks=[2],
        window_positional_embedding_background_size=[2, 2],
    )  # fmt: skip
    config = transformers.Sam2Config(
        vision_config=dict(backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8], fpn_hidden_size=16,
                           backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]]),
        prompt_encoder_config=dict(hidden_size=16, image_size=64, patch_size=16),
        mask_decoder_config=dict(hidden_size=16, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2,
                                 iou_head_hidden_dim=16),
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Sam2Model(config).save_pretrained(folder)


def save_florence2(folder: Path) -> None:
    """Its words are single letters, which its captions are made of."""
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = transformers.BartTokenizer(
        vocab={word: k for k, word in enumerate(words)}, merges=[], extra_special_tokens={"image_token": "<image>"}
    )
    tokenizer.add_tokens([f"<loc_{k}>" for k in range(1000)])
    ends = dict(bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2)
    config = transformers.Florence2Config(
        vision_config=dict(depths=[1] * 4, embed_dim=[8, 8, 16, 16], num_heads=[1, 1, 2, 2], num_groups=[1, 1, 2, 2],
                           window_size=2, projection_dim=16, drop_path_rate=0.0),
        text_config=dict(model_type="bart", vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1,
                         encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
                         max_position_embeddings=1200, **ends),
        image_token_id=tokenizer.image_token_id, **ends,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Florence2ForConditionalGeneration(config)
    _spread_weights(model)
    letters = set(tokenizer.convert_tokens_to_ids([*"abcdefgh", "</s>"]))
    model.generation_config.min_new_tokens = 4
    model.generation_config.suppress_tokens = sorted(set(range(len(tokenizer))) - letters)
    model.save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False, image_seq_length=5)
    rules = {"description_with_bboxes": {}, "pure_text": {}}
    transformers.Florence2Processor(images, tokenizer, post_processor_config=rules).save_pretrained(folder)
